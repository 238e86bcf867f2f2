"""experiments.emergence as a user runs it: five phenomena for a few steps, tables and a report."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

RECIPE = """
import dataclasses

from configs import emergence
from configs.dataclass_config import to_config_dict
from configs.schema import EmergenceConfig
from llm.training.config import ScheduleConfig


def get_config(arg=None):
    few = dict(seeds=(0, 1), total_steps=4, num_evaluations=2, schedule=ScheduleConfig())
    model = dict(small=emergence.small(16, num_layers=1, vocab=28))
    replace = dataclasses.replace
    grokking = emergence.grokking(modulus=7, train_fraction=0.5, total_steps=4, seeds=(0, 1))
    induction = emergence.induction()
    return to_config_dict(EmergenceConfig(
        grokking=replace(grokking, num_evaluations=2),
        addition=replace(emergence.addition(), digits=(2,), num_examples=(20, 30),
                         num_held_out=10, batch_sequences=8, models=model, **few),
        induction=replace(induction, length_tokens=16, shortest_segment_tokens=3,
                          num_held_out=4, **few),
        parity=replace(emergence.parity(), num_subtasks=5, num_bits=6, subset_bits=2,
                       batch_rows=32, held_out_rows_per_subtask=20, widths=(4, 8), **few),
        few_shot=replace(emergence.few_shot(), shots=(0, 2), num_held_out=16,
                         batch_sequences=8, models=model, **few),
    ))
"""


def run(*arguments, expect=0):
    command = [sys.executable, "-m", "experiments.emergence", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("emergence") / "recipe.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def whole(recipe):
    run(f"--config={recipe}", f"--workdir={recipe.parent / 'run'}")
    return recipe.parent / "run"


def rows_of(workdir, name):
    return pyarrow.parquet.read_table(workdir / f"{name}.parquet").to_pylist()


def test_every_evaluation_is_a_row(whole):
    # runs × evaluations (steps 0, 2 and 4): seeds × decays; digits × orders × examples × seeds; …
    counts = {name: len(rows_of(whole, name)) for name in ("grokking", "addition", "induction")}
    assert counts == {"grokking": 4 * 3, "addition": 2 * 2 * 2 * 3, "induction": 2 * 2 * 3}
    assert len(rows_of(whole, "parity")) == len(rows_of(whole, "few_shot")) * 2 == 12
    for row in rows_of(whole, "addition"):
        assert {"digits", "order", "num_examples", "seed", "test/exact_match"} <= set(row)
        assert row["test/answer_nats"] > 0
    power = [row["spectrum/power_0"] for row in rows_of(whole, "grokking")]
    assert all(0 < share < 1 for share in power)


def test_seeds_differ_and_decay_alone_does_not_change_the_start(whole):
    start = [row for row in rows_of(whole, "grokking") if row["step"] == 0]
    nats = {(row["weight_decay"], row["seed"]): row["test/answer_nats"] for row in start}
    assert nats[1.0, 0] == nats[0.0, 0] != nats[1.0, 1]


def test_the_report_tells_of_all(whole):
    page = (whole / "report.md").read_text()
    for title in ("Grokking", "Addition", "Induction heads", "Sparse parity", "Few-shot learning"):
        assert f"## {title}" in page
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) >= {"grokking", "addition", "induction", "parity", "few_shot"}
    gap = summary["addition"]["exact_match_minus_product"]
    rows = rows_of(whole, "addition")
    expected = [row["test/exact_match"] - row["test/product_of_accuracies"] for row in rows]
    assert gap["mean"] == pytest.approx(np.mean(expected))


def test_started_again_it_finds_all_done(whole, recipe):
    done = run(f"--config={recipe}", f"--workdir={whole}")
    assert done.stdout.count("done before") == 5


def test_a_mistake_is_one_line(recipe, tmp_path):
    typo = run(
        f"--config={recipe}", f"--workdir={tmp_path}", "--config.grokking.modulos=5", expect=2
    )
    assert "did you mean modulus" in typo.stderr
    wrong = run("--config=configs/emergence.py:groking", f"--workdir={tmp_path}", expect=2)
    assert "grokking" in wrong.stderr and "Traceback" not in wrong.stderr
