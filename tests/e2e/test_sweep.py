"""experiments.sweep as a user runs it: listed, broken off, gone on with, halved, reported."""

import csv
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree

import pytest
from etils import epath

from configs.schema import SweepConfig
from configs.sweep_space import grid, listed, product, when
from experiments.sweep_members import resolve
from experiments.sweep_report import write_sweep_report
from experiments.sweep_results import Result, read_results
from llm.training.loading import load_params
from llm.training.lock import Lock
from llm.training.metrics import read_metrics
from tests.e2e.life import write_life
from tests.faults.harness import finish, start, wait_until

SWEEP = """
from configs.dataclass_config import to_config_dict
from configs.schema import SweepConfig
from configs.sweep_space import grid, listed
from llm.launch.config import HalvingConfig

def get_config(arg=None):
    config = to_config_dict(SweepConfig)
    config.recipe = {recipe!r}
    config.members = grid({{"optimizer.learning_rate": [1e-4, 1e-2]}})
    config.shared = listed({{"total_steps": 6, "schedule.decay_steps": 2}})
    config.halving = to_config_dict(HalvingConfig(at_steps=(3,), factor=2))
    return config
"""


def sweep(folder, *flags):
    command = [sys.executable, "-m", "experiments.sweep", f"--config={folder / 'sweep.py'}"]
    one_device = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("count=8", "count=1")}
    return subprocess.Popen(
        [*command, f"--workdir={folder / 'sweep'}", *flags],
        env=os.environ | one_device,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(child, expect=0):
    try:
        out, err = child.communicate(timeout=1200)
    finally:
        child.kill()
    assert child.returncode == expect, err
    return out + err


@pytest.fixture
def folder(tmp_path):
    write_life(tmp_path)
    recipe = f"{tmp_path / 'recipes.py'}:pretrain"
    (tmp_path / "sweep.py").write_text(SWEEP.format(recipe=recipe))
    return tmp_path


@pytest.mark.slow
def test_it_is_listed_before_anything_runs_and_a_typo_is_one_line(folder):
    listed_only = outcome(sweep(folder, "--dry_run"))
    assert "learning_rate=0.0001" in listed_only and "at most, with halving" in listed_only
    # as it is started: up to the first rung
    started = "--config.optimizer.learning_rate=0.0001 --config.run.stop_at_step=3 --process=alone"
    assert started in listed_only
    assert not (folder / "sweep").exists()
    (folder / "sweep.py").write_text(
        (folder / "sweep.py").read_text().replace("total_steps", "totel_steps")
    )
    typo = outcome(sweep(folder), expect=2)
    assert typo == (
        "error: members[0]: config has no field 'totel_steps'; did you mean total_steps?\n"
    )


def test_a_second_sweep_in_a_workdir_is_refused(folder):
    (folder / "sweep").mkdir()
    lock = Lock(folder / "sweep")
    lock.acquire()
    assert "is in use by process" in outcome(sweep(folder), expect=2)
    lock.release()


@pytest.mark.long
def test_a_sweep_broken_off_ends_as_the_runs_would_alone(folder):
    child = sweep(folder)
    first = folder / "sweep" / "learning_rate=0.0001"
    wait_until(lambda: (first / "metrics.jsonl").exists() and read_metrics(first), child)
    child.send_signal(signal.SIGINT)
    assert "the same command goes on" in outcome(child, expect=75)
    said = outcome(sweep(folder))
    assert "step 3: 1 go on" in said and "report.html" in said

    rung = json.loads((folder / "sweep" / "rungs.json").read_text())["rungs"][0]
    losses = {
        name: read_metrics(folder / "sweep" / name)[2]["train/loss"] for name in rung["values"]
    }
    assert rung["step"] == 3 and rung["values"] == losses and len(losses) == 2
    (best,) = rung["kept"]
    assert losses[best] == min(losses.values())
    with (folder / "sweep" / "members.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done", "stopped at step 3"]
    assert rows[0]["member"] == best and rows[0]["step"] == "6"

    # The survivor was stopped at the rung at least; alone it was never stopped.
    rate = best.removeprefix("learning_rate=")
    alone = folder / "alone"
    flags = ("--config.total_steps=6", "--config.schedule.decay_steps=2")
    finish(start("pretrain", folder, alone, *flags, f"--config.optimizer.learning_rate={rate}"))
    assert load_params(alone).digest == load_params(folder / "sweep" / best).digest
    assert "report.html" in outcome(sweep(folder, "--report_only"))


# ------------------------------------------------------------------------------- report


def results_of(members):
    found = []
    for i, member in enumerate(members):
        rows = [{"step": s, "eval/all/loss": 3 + 1 / s + 0.1 * i} for s in range(1, 40)]
        state = "done" if i < 4 else "stopped at step 39"
        found.append(Result(member, state, rows[-1]["eval/all/loss"], 39, 10.0, rows, ""))
    failed = found[-1]._replace(state="failed: a bug (exit code 1)", value=None, rows=[])
    diverged = found[-2]._replace(value=float("nan"))
    return [*found[:-2], diverged, failed._replace(tail="ValueError: <the> last & line")]


def test_the_report_shows_every_member_and_draws_every_field(tmp_path):
    sweep = SweepConfig(
        recipe="configs/pretrain_tiny.py",
        members=product(
            grid({"optimizer.name": ["adamw", "muon"], "optimizer.learning_rate": [1e-3, 1e-2]}),
            when({"optimizer.name": "muon"}, grid({"optimizer.beta1": [0.9, 0.95]})),
        ),
        shared=listed({"evaluation.prompts": ()}),
        metric="eval/all/loss",
    )
    results = results_of(resolve(sweep))
    write_sweep_report(epath.Path(tmp_path), sweep, results)
    page = (tmp_path / "report.html").read_text()
    assert "ValueError: &lt;the&gt; last &amp; line" in page
    text = (tmp_path / "report.md").read_text()
    assert "6: 4 done, 1 stopped, 1 failed" in text
    assert "| 1 | 3.0256 | optimizer.name=adamw" in text.replace("\\", "")
    drawn = sorted(file.stem for file in (tmp_path / "report_figures").iterdir())
    fields = ["field-optimizer-beta1", "field-optimizer-learning-rate", "field-optimizer-name"]
    assert drawn == ["curves", *fields, "parallel-coordinates"]
    for file in (tmp_path / "report_figures").iterdir():
        xml.etree.ElementTree.parse(file)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == results[0].member.name and len(summary["members"]) == 6
    assert summary["members"][-2]["eval/all/loss"] is None  # NaN


def test_seeds_are_taken_together_and_the_best_mean_is_first(tmp_path):
    sweep = SweepConfig(
        recipe="configs/pretrain_tiny.py",
        members=grid({"optimizer.learning_rate": [1e-3, 1e-2], "seed": [1, 2]}),
        metric="eval/all/loss",
    )
    values = (3.0, 5.0, 3.5, 3.7)  # the best one is of the worse rate
    results = [
        Result(member, "done", value, 2, 1.0, [{"step": 2, "eval/all/loss": value}], "")
        for member, value in zip(resolve(sweep), values, strict=True)
    ]
    ended = results[0]._replace(value=9.0, state="stopped at step 1")  # it was not to its end
    results.append(ended)
    write_sweep_report(epath.Path(tmp_path), sweep, results)
    text = (tmp_path / "report.md").read_text().partition("## Over seeds")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 0")]
    assert rows == [["0.01", "3.6000", "0.1414", "2"], ["0.001", "4.0000", "1.4142", "2"]]
    drawn = {file.stem for file in (tmp_path / "report_figures").iterdir()}
    assert drawn == {"curves", "parallel-coordinates", "field-optimizer-learning-rate"}


def test_a_sweep_of_which_nothing_has_run_has_a_report(tmp_path):
    sweep = SweepConfig(
        recipe="configs/pretrain_tiny.py", members=grid({"seed": [1, 2]}), metric="eval/x"
    )
    results = read_results(epath.Path(tmp_path), sweep, resolve(sweep))
    write_sweep_report(epath.Path(tmp_path), sweep, results)
    assert "2: 2 not finished" in (tmp_path / "report.md").read_text()


def test_what_an_executor_alone_knows_to_have_failed_is_told(tmp_path):
    """A cloud's job that never came to write anything."""
    sweep = SweepConfig(recipe="configs/pretrain_tiny.py", members=grid({"seed": [1, 2]}))
    members = resolve(sweep)
    told = {members[0].name: "FAILED_NO_RESOURCE"}
    results = read_results(epath.Path(tmp_path), sweep, members, told)
    write_sweep_report(epath.Path(tmp_path), sweep, results)
    text = (tmp_path / "report.md").read_text().replace("\\_", "_")
    assert f"{members[0].name}: failed: FAILED_NO_RESOURCE" in text
    assert "1 failed" in text and "1 not finished" in text
