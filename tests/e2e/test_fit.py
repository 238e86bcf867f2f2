"""experiments.fit as a user runs it: every method, its report, and every kind of mistake."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HOUSE = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Tables made from Hoffmann's constants with half a percent of noise."""
    folder = tmp_path_factory.mktemp("fit")
    rng = np.random.default_rng(0)

    def write(name: str, rows: list[tuple[float, float, float]]) -> None:
        lines = []
        for num_params, num_tokens, epochs in rows:
            fresh = num_tokens / epochs * (1 + 15 * (1 - np.exp(-(epochs - 1) / 15)))
            loss = 1.69 + 406.4 / num_params**0.34 + 410.7 / fresh**0.28
            loss *= np.exp(0.003 * rng.normal())
            lines.append(f"{num_params},{num_tokens},{num_tokens / epochs},{loss}\n")
        (folder / name).write_text(
            "Model Size,Training Tokens,unique_tokens,loss\n" + "".join(lines)
        )

    sizes, tokens = np.geomspace(1e7, 5e9, 9), np.geomspace(1e9, 3e11, 9)
    write("grid.csv", [(n, d, 1) for n in sizes for d in tokens])
    budgets = [(c, 2.5e8 * (c / 1e19) ** 0.45) for c in np.geomspace(1e18, 1e21, 6)]
    around = np.geomspace(0.15, 6, 8)
    write("budgets.csv", [(b * x, c / 6 / (b * x), 1) for c, b in budgets for x in around])
    small = np.geomspace(1e6, 3e8, 5)
    write("repeated.csv", [(n, u * e, e) for n in small for u in (2e8, 1e9) for e in (1, 3, 9, 30)])
    write("one_size.csv", [(1e8, d, 1) for d in tokens])
    return folder


def start(folder, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "JAX_COMPILATION_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "experiments.fit", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("method", "table", "names"),
    [
        ("parametric", "grid.csv", {"E", "A", "B", "alpha", "beta"}),
        ("isoflop", "budgets.csv", set()),
        ("envelope", "grid.csv", set()),
        ("kaplan", "grid.csv", {"N_c", "D_c", "alpha_N", "alpha_D"}),
        ("data_constrained", "repeated.csv", {"E", "A", "B", "alpha", "beta", "R_D_star"}),
    ],
)
def test_every_method_fits_reports_and_prints_json(folder, method, table, names):
    output = folder / method
    arguments = [f"--csv={table}", f"--method={method}", "--budget=1e21", "--budget=1e22"]
    arguments += ["--bootstrap=100", "--unique_tokens=1e9", f"--output={output}", "--json"]
    result = start(folder, *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["method"] == method and found["num_bad_rows"] == 0
    assert names <= set(found["estimates"])
    for estimate in found["estimates"].values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert [optimum["flops"] for optimum in found["optima"]] == [1e21, 1e22]
    for optimum in found["optima"]:
        product = 6 * optimum["num_params"]["value"] * optimum["num_tokens"]["value"]
        assert product == pytest.approx(optimum["flops"], rel=1e-6)
    assert found["held_out"]["mean_relative_error"] < 0.6

    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    assert page.count("<figure>") == len(list((output / "report_figures").glob("*.svg"))) >= 3
    assert "Notes" in text and "guessed" in text
    with (output / "plotted.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert set(rows[0]) == {"figure", "series", "x", "y", "low", "high"}
    drawn = {path.stem for path in (output / "report_figures").glob("*.svg")}
    assert {row["figure"] for row in rows} == drawn


def test_the_summary_reads_as_text(folder):
    result = start(folder, "--csv=grid.csv", "--bootstrap=100", "--budget=1e26")
    assert result.returncode == 0, result.stderr
    for part in (
        "81 rows of grid.csv",
        "columns guessed from their names: params = 'Model Size'",
        "all 500 starts arrive at one optimum",
        "95% interval",
        "α ",
        "best for 1e26 FLOPs: ",
        "tokens per parameter",
        "1e26 FLOPs are 11,111 times the largest run",
        "larger runs to 0.0",
    ):
        assert part in result.stdout, part
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--csv=grid.csv", "--metod=kaplan"], "unknown flag --metod; did you mean --method?"),
        (["--csv=no.csv"], "No such file or directory: no.csv"),
        (
            ["--csv=grid.csv", "--loss_column=Loss"],
            "grid.csv has no column 'Loss' (loss_column); "
            "did you mean 'loss'? It has Model Size, Training Tokens, unique_tokens, loss",
        ),
        (
            ["--csv=grid.csv", "--outliers=some"],
            "--outliers=some: it is none, auto, a number, or highest:number",
        ),
        (["--csv=grid.csv", "--budget=0"], "--budget=0.0: FLOPs are a positive number, as 1e21"),
        (["--csv=one_size.csv"], "sizes of model: 1"),
        (["--csv=one_size.csv", "--method=isoflop"], "no budget has a minimum"),
        (["--csv=grid.csv", "--method=data_constrained"], "0 runs repeat their data"),
    ],
)
def test_a_mistake_or_a_table_that_determines_nothing_is_one_line(folder, arguments, line):
    result = start(folder, *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith(f"error: {line}") and result.stderr.count("\n") == 1
