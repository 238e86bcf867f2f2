"""experiments/loss_perspective.py as a user runs it: figures, a report, mistakes in one line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HOUSE = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.loss_perspective", *arguments],
        cwd=HOUSE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pathlib.Path:
    """Ten models in three sizes whose scores are a function of their loss alone."""
    lines = ["name,params,step,seen,ppl,acc,$odd score"]
    for i in range(10):
        size = 10.0 ** (6 + i % 3)
        for step in (0, 100, 1000, 10_000, 100_000):
            tokens = 1e4 * step
            loss = 1 + 100 * size**-0.3 + 1e3 * (tokens + 1e5) ** -0.4
            score = 1 / (1 + np.exp(loss - 4))
            lines.append(f"m{i},{size},{step},{tokens},{np.exp(loss)},{score},{1 - score}")
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    path.write_text("\n".join(lines))
    return path


COLUMNS = ("--perplexity_column=ppl", "--tokens_column=seen", "--model_column=name")


def test_figures_and_report(table, tmp_path):
    result = run(f"--csv={table}", *COLUMNS, "--scores=acc,$odd score", "--json",
                 f"--output={tmp_path}", "--min_step=100")  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_rows"], report["num_models"], report["degree"]) == (40, 10, 3)
    by_loss, by_compute = (report["scores"]["acc"][f"log_{x}"] for x in ("perplexity", "compute"))
    assert by_loss["r_squared"] > 0.999 > 0.95 > by_compute["r_squared"]
    assert by_loss["held_out_r_squared"] > by_compute["held_out_r_squared"]
    markdown = (tmp_path / "report.md").read_text()
    assert "2 of 2 scores: acc, " in markdown and "report_figures/score-acc.svg" in markdown
    figure = (tmp_path / "report_figures/score-acc.svg").read_text()
    for colour in ("#56b4e9", "#e69f00", "#009e73"):  # one for each of the three sizes
        assert colour in figure
    assert len(list((tmp_path / "report_figures").iterdir())) == 2
    assert "<svg" not in (tmp_path / "report.html").read_text()  # embedded as images


def test_a_plain_run_prints_a_table(table):
    result = run(f"--csv={table}", *COLUMNS, "--scores=acc")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("40 checkpoints of 10 models\n")
    assert "acc by log perplexity" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--csv=no.csv",), "error: No such file or directory: no.csv"),
        (("--scores=ac",), "no column 'ac'; did you mean 'acc'?"),
        (("--scores=acc", "--perplexity_column=pppl"), "did you mean 'ppl'?"),
        (("--scores=acc,acc",), "--scores=acc,acc: give one column at least, each once"),
        (("--scores=acc", "--min_step=0"), "seen is no positive number in 10 rows"),
    ],
)
def test_a_mistake_is_one_line(table, arguments, message):
    result = run(f"--csv={table}", *COLUMNS, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
