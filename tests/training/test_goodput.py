"""Goodput: every second of a run has one cause, and starts add up."""

import time

import jax
import jax.numpy as jnp
import pytest
from toy_loop import ToyBatches, toy_state, toy_step

from llm.training.goodput import CAUSES, Goodput, find_goodput, read_goodput, sum_goodput
from llm.training.run import Run
from llm.training.run_config import RunConfig


def train(workdir, stop_after, *, evaluation=0.0, data=0.0, work=0.0, **options):
    class SlowBatches(ToyBatches):
        def __next__(self):
            time.sleep(data)
            return super().__next__()

    options = {"log_every_steps": 1, "save_every_steps": 4} | options
    run = Run(workdir, {}, RunConfig(**options), total_steps=12, tokens_per_step=1)
    began = time.monotonic()
    with run:
        state, batches = run.restore(toy_state(), SlowBatches())
        while run.step < stop_after:
            batch = next(batches)
            time.sleep(work)
            state = run.after_step(*toy_step(state, batch))
            if run.due(6):
                time.sleep(evaluation)
    return time.monotonic() - began


def test_each_second_is_counted_for_its_cause(tmp_path):
    began = time.monotonic()
    Goodput(tmp_path / "before").close()  # all before is this one's
    inside = train(tmp_path, 12, evaluation=0.3, data=0.02, work=0.05)
    outside = time.monotonic() - began
    report = read_goodput(tmp_path)
    assert tuple(report.seconds) == CAUSES and report.starts == 1
    # Lower bounds for each, and no more in all than has passed: nothing is counted twice.
    assert inside - 0.05 < report.total_seconds < outside
    assert report.seconds["train"] > 12 * 0.05
    assert report.seconds["stall"] > 12 * 0.02
    assert report.seconds["evaluate"] > 2 * 0.3
    assert report.seconds["save"] > 0 and report.seconds["restore"] > 0
    assert report.seconds["redo"] == 0
    assert report.goodput == report.seconds["train"] / report.total_seconds


def test_steps_done_again_are_no_progress(tmp_path):
    train(tmp_path, 7, work=0.05)  # step 4 is saved
    train(tmp_path, 12, work=0.05)
    report = read_goodput(tmp_path)
    assert report.starts == 2
    assert report.seconds["redo"] > 3 * 0.05 and report.seconds["train"] > 12 * 0.05
    both = sum_goodput([report, report])
    assert both.total_seconds == pytest.approx(2 * report.total_seconds) and both.starts == 4
    assert "over 2 starts" in report.describe() and "redo" in report.describe()


def test_compiling_is_taken_out_of_what_waits_for_it(tmp_path):
    stopwatch = Goodput(tmp_path)
    stopwatch.listen()
    stopwatch.enter("evaluate")
    began = time.monotonic()
    grow = jax.jit(lambda x: sum(jnp.sin(x * i) for i in range(200)))
    grow(jnp.ones(7)).block_until_ready()
    elapsed = time.monotonic() - began
    seconds = stopwatch.seconds
    stopwatch.close()
    assert seconds["compile"] > 0.5 * elapsed
    assert elapsed - 0.02 < seconds["compile"] + seconds["evaluate"] < elapsed + 0.1
    jax.jit(lambda x: x + 1)(1.0)  # nobody listens any more
    assert stopwatch.seconds["compile"] == seconds["compile"]


def test_time_between_two_runs_of_a_process_belongs_to_the_second(tmp_path):
    began = time.monotonic()
    Goodput(tmp_path / "a").close()
    time.sleep(0.1)
    second = Goodput(tmp_path / "b")
    assert 0.1 < second.seconds["start"] < time.monotonic() - began
    second.close()


def test_the_runs_of_a_job_are_found(tmp_path):
    for name in ("alone", "study/one", "study/two"):
        train(tmp_path / name, 1)
    found = find_goodput(tmp_path)
    assert list(found) == ["alone", "study/one", "study/two"]
    assert all(report.starts == 1 and report.total_seconds > 0 for report in found.values())


def test_a_torn_record_is_left_out(tmp_path):
    train(tmp_path, 12)
    (tmp_path / "goodput" / "1.json").write_text('{"began": 1, "sec')
    assert read_goodput(tmp_path).starts == 1
    assert read_goodput(tmp_path / "nothing").total_seconds == 0
