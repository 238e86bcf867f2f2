"""Run: a run stopped in any way and started again ends bitwise where the unbroken one ends."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from toy_loop import ToyBatches, run_toy, toy_state, toy_step

from llm.training import manifests
from llm.training.checkpoints import CheckpointError
from llm.training.loading import load_params, verify
from llm.training.manifests import list_steps, read_ledger
from llm.training.metrics import read_metrics
from llm.training.profiling import ProfileWindow
from llm.training.run import Run
from llm.training.run_config import (
    ConfigChangedError,
    RunConfig,
    check_config,
    config_difference,
)
from llm.training.step_log import NonFiniteError
from tests.faults.harness import wait_until

TOY = pathlib.Path(__file__).with_name("toy_loop.py")
REPOSITORY = TOY.parents[2]


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def logged(workdir):
    """The log without what a clock decides."""
    return [
        {name: x for name, x in row.items() if not name.startswith("perf/")}
        for row in read_metrics(workdir)
    ]


def start_child(workdir, *options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(TOY), str(workdir), *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """State and log of 12 steps without interruption."""
    workdir = tmp_path_factory.mktemp("unbroken")
    state, _ = run_toy(workdir, 12)
    return state, logged(workdir), (workdir / "texts.jsonl").read_text()


def assert_goes_on_as_unbroken(workdir, unbroken):
    state, log, texts = unbroken
    resumed, run = run_toy(workdir, 12)
    assert run.step == 12
    assert_same_bits(resumed, state)
    assert logged(workdir) == log
    assert (workdir / "texts.jsonl").read_text() == texts


def test_the_unbroken_log(unbroken):
    _, log, texts = unbroken
    assert [row["step"] for row in log if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in log if "eval/sum" in row] == [5, 10, 12]
    assert log[5].keys() == {"step", "eval/sum"} and log[4]["step"] == 5
    assert [json.loads(line)["step"] for line in texts.splitlines()] == [5, 10, 12]


@pytest.mark.parametrize("stop_after", [4, 5, 7, 10])
def test_four_is_two_and_two(tmp_path, unbroken, stop_after):
    run_toy(tmp_path, 12, stop_after=stop_after)
    assert list_steps(tmp_path)[-1] == stop_after - stop_after % 2
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_a_finished_run_does_nothing_more(tmp_path, unbroken):
    run_toy(tmp_path, 12)
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_a_relative_workdir(tmp_path, unbroken, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_toy("runs/toy", 12, stop_after=3)
    monkeypatch.chdir(tmp_path / "runs")
    assert load_params("toy").step == 2 and verify("toy")[0].problems == ()
    assert_goes_on_as_unbroken(pathlib.Path("toy"), unbroken)


def test_killed_before_the_first_checkpoint(tmp_path, unbroken):
    with pytest.raises(RuntimeError, match="stop"):
        run_until_error(tmp_path, 1, save_every_steps=100)
    assert list_steps(tmp_path) == [] and len(logged(tmp_path)) == 1
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def run_until_error(workdir, step, **options):
    """Fail in the body of a step: after the checkpoint, in the middle of the evaluation."""
    config = RunConfig(**({"log_every_steps": 1, "save_every_steps": 2} | options))
    run = Run(workdir, {"seed": 0}, config, total_steps=12, tokens_per_step=32)
    with run:
        state, batches = run.restore(toy_state(), ToyBatches())
        while True:
            state, metrics = toy_step(state, next(batches))
            state = run.after_step(state, metrics)
            if run.due(5):
                run.write_metrics({"eval/sum": jnp.sum(state.params["kernel"])})
            if run.step == step:
                raise RuntimeError("stop")
            if run.due(5):
                run.write_texts({"sample": f"text of step {run.step}"})


@pytest.mark.parametrize("step", [3, 5, 10])  # 10 is saved, and evaluated before the error
def test_an_error_in_the_loop_flushes_metrics_and_loses_nothing(tmp_path, unbroken, step):
    with pytest.raises(RuntimeError, match="stop"):
        run_until_error(tmp_path, step)
    assert read_metrics(tmp_path)[-1]["step"] == step
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_a_run_that_ends_early_for_now_goes_on_as_unbroken(tmp_path, unbroken):
    for step in (5, 10):
        _, run = run_toy(tmp_path, 12, stop_at_step=step)
        assert run.step == step and list_steps(tmp_path)[-1] == step
        assert set(read_metrics(tmp_path)[-1]) == {"step", "eval/sum"}
        manifest = manifests.read_manifest(epath.Path(tmp_path / "checkpoints" / str(step)))
        assert manifest["total_steps"] == 12 and manifest["body_done"]
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_what_is_done_at_the_end_is_done_at_an_early_one(tmp_path):
    run_toy(tmp_path, 12, stop_at_step=7)
    assert [row["step"] for row in read_metrics(tmp_path) if "eval/sum" in row] == [5, 7]
    run_toy(tmp_path, 12, stop_at_step=99)
    assert list_steps(tmp_path)[-1] == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_exact_step(tmp_path, unbroken, number, capfd):
    """In this process: the signal comes during step 5, at which an evaluation is due."""
    config = RunConfig(log_every_steps=1, save_every_steps=100)
    run = Run(tmp_path, {"seed": 0}, config, total_steps=12, tokens_per_step=32)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, run:
        state, batches = run.restore(toy_state(), ToyBatches())
        while True:
            state, metrics = toy_step(state, next(batches))
            if run.step == 4:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # a second one is safe
            state = run.after_step(state, metrics)
    assert stopped.value.code == 75 and signal.getsignal(number) == before
    assert list_steps(tmp_path) == [5]
    shown = " ".join(capfd.readouterr().err.split())
    assert f"{signal.Signals(number).name}: saving at the end of this step" in shown
    assert "already saving" in shown and "step 5 is saved" in shown
    assert_goes_on_as_unbroken(tmp_path, unbroken)  # the evaluation of step 5 included


def test_a_signal_during_the_loop_body_saves_before_an_evaluation(tmp_path, unbroken):
    config = RunConfig(log_every_steps=1, save_every_steps=2)
    run = Run(tmp_path, {"seed": 0}, config, total_steps=12, tokens_per_step=32)
    with pytest.raises(SystemExit) as stopped, run:
        state, batches = run.restore(toy_state(), ToyBatches())
        while run.step < 10:
            state, metrics = toy_step(state, next(batches))
            state = run.after_step(state, metrics)
            if run.due(5):
                run.write_metrics({"eval/sum": jnp.sum(state.params["kernel"])})
                run.write_texts({"sample": f"text of step {run.step}"})
            if run.step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
                run.due(5)
    assert stopped.value.code == 75 and list_steps(tmp_path)[-1] == 9
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_a_signal_before_the_first_step_leaves_at_once(tmp_path):
    run = Run(tmp_path, {}, RunConfig(), total_steps=3, tokens_per_step=1)
    with pytest.raises(SystemExit) as stopped, run:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("still running")
    assert stopped.value.code == 75 and list_steps(tmp_path) == []


def test_sigterm_ends_a_process_with_75(tmp_path, unbroken):
    child = start_child(tmp_path, "--save_every_steps=1000000")
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and logged(tmp_path), child)
    child.send_signal(signal.SIGTERM)
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 75, error
    (step,) = list_steps(tmp_path)
    assert f"SIGTERM: step {step} is saved" in " ".join(error.split())
    assert logged(tmp_path)[-1]["step"] == step
    assert read_ledger(tmp_path)[0]["cursor"] == 4 * step


def test_kill_9_during_a_save_goes_on_from_the_step_before(tmp_path, unbroken):
    # When Orbax has committed step 6 and only the manifest is missing.
    child = start_child(tmp_path, "--total_steps=12", "--die_at=write_manifest:6")
    assert child.wait(60) == -signal.SIGKILL
    assert list_steps(tmp_path) == [2, 4] and (tmp_path / "checkpoints" / "6").exists()
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_kill_9_at_a_random_time(tmp_path, unbroken):
    delay = random.Random(time.time_ns()).uniform(0.0, 0.4)
    print("killed after", delay, "s")
    child = start_child(tmp_path, "--total_steps=12", "--save_every_steps=1")
    wait_until(lambda: list_steps(tmp_path), child)
    time.sleep(delay)
    child.kill()
    child.wait(60)
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_moves_to_eight_devices_and_back(tmp_path, unbroken):
    mesh = jax.make_mesh((8,), ("fsdp",))

    def spread(x):
        rows = x.ndim == 2 and x.shape[0] % 8 == 0
        return jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("fsdp") if rows else PartitionSpec())
        )

    def go_on(state, stop_after):
        config = RunConfig(save_every_steps=2)
        run = Run(tmp_path, {"seed": 0}, config, total_steps=12, tokens_per_step=32)
        with run:
            state, batches = run.restore(state, ToyBatches())
            restored = jax.tree.map(np.asarray, state)
            while run.step < stop_after:
                state, metrics = toy_step(state, next(batches))
                state = run.after_step(state, metrics)
        return restored, jax.tree.map(np.asarray, state)

    _, end = go_on(toy_state(), 4)
    start, middle = go_on(jax.tree.map(spread, toy_state()), 8)
    assert_same_bits(start, end)
    start, end = go_on(toy_state(), 12)
    assert_same_bits(start, middle)
    for x, y in zip(jax.tree.leaves(end), jax.tree.leaves(unbroken[0]), strict=True):
        # Sums are taken in another order; a bfloat16 has 8 bits, and 12 steps add up.
        tolerance = 0.02 if x.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-5, atol=tolerance)


def test_a_failed_save_is_raised_at_the_next_step(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests, "hash_files", full)
    run = Run(tmp_path, {}, RunConfig(save_every_steps=1), total_steps=9, tokens_per_step=1)
    with pytest.raises(CheckpointError, match="step 1 .*No space left"), run:
        state, batches = run.restore(toy_state(), ToyBatches())
        state, metrics = toy_step(state, next(batches))
        state = run.after_step(state, metrics)
        time.sleep(1)
        state, metrics = toy_step(state, next(batches))
        run.after_step(state, metrics)
        pytest.fail("step 2 went on")


def test_a_failed_last_save_is_raised_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        run_toy(tmp_path, 1)
    assert list_steps(tmp_path) == []


def test_gives_up_after_too_many_steps_without_a_finite_gradient(tmp_path):
    run = Run(tmp_path, {}, RunConfig(max_skipped_in_a_row=3), total_steps=9, tokens_per_step=1)
    bad = {"x": jnp.full(4, jnp.nan), "cursor": np.uint32(0)}
    with pytest.raises(NonFiniteError, match="3 steps in a row up to step 3 had no finite"), run:
        state, _ = run.restore(toy_state(), None)
        while run.step < 9:
            state, metrics = toy_step(state, bad)
            state = run.after_step(state, metrics)
    assert run.step == 4  # read one step late


class PoisonedBatches(ToyBatches):
    """From sequence 16 on there is nothing but NaN."""

    def __next__(self):
        batch = super().__next__()
        if self.cursor > 16:
            batch["x"] = np.full(4, np.nan, np.float32)
        return batch


def test_steps_that_are_not_finite_name_their_sequences_and_count_over_a_restart(tmp_path, capfd):
    config = RunConfig(max_skipped_in_a_row=4, log_every_steps=100, save_every_steps=2)

    def train(stop_after):
        run = Run(tmp_path, {}, config, total_steps=12, tokens_per_step=1)
        with run:
            state, batches = run.restore(toy_state(), PoisonedBatches())
            while run.step < stop_after:
                state = run.after_step(*toy_step(state, next(batches)))

    train(6)
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert sorted(rows) == [1, 5, 6]  # logged though no log is due
    assert (rows[6]["train/sequences_begin"], rows[6]["train/sequences_end"]) == (20, 24)
    with pytest.raises(NonFiniteError, match="4 steps in a row up to step 8"):
        train(12)
    said = " ".join(capfd.readouterr().err.split())
    assert "step 5: loss or gradient is not finite; parameters are left as they were" in said
    assert "(sequences 16 to 19 of the data)" in said


def test_metrics_are_read_one_step_late(tmp_path):
    run = Run(tmp_path, {}, RunConfig(log_every_steps=1), total_steps=9, tokens_per_step=1)
    with run:
        state, batches = run.restore(toy_state(), ToyBatches())
        for step in range(1, 4):
            state, metrics = toy_step(state, next(batches))
            state = run.after_step(state, metrics)
            assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, step))
    assert len(read_metrics(tmp_path)) == 3


def test_speed_and_mfu(tmp_path):
    run = Run(
        tmp_path,
        {},
        RunConfig(log_every_steps=10),
        total_steps=20,
        tokens_per_step=500,
        flops_per_token=6e6,
        peak_flops=1e12,
    )
    with run:
        run.restore(toy_state(), None)
        for _ in range(20):
            time.sleep(0.01)
            run.after_step(toy_state(), {"train/loss": 1.0})
    rows = [row for row in read_metrics(tmp_path) if "perf/mfu" in row]
    assert rows
    for row in rows:
        tokens_per_second = row["perf/tokens_per_second"]
        assert 0 < tokens_per_second < 500 / 0.01
        assert row["perf/step_seconds"] * tokens_per_second == pytest.approx(500, rel=1e-3)
        assert row["perf/mfu"] == pytest.approx(tokens_per_second * 6e6 / 1e12, rel=1e-3)


def test_saves_by_time(tmp_path):
    config = RunConfig(save_every_steps=0, save_every_seconds=0.3)
    run = Run(tmp_path, {}, config, total_steps=1000, tokens_per_step=1)
    with run:
        state, batches = run.restore(toy_state(), ToyBatches())
        state = run.after_step(*toy_step(state, next(batches)))
        time.sleep(0.35)
        state = run.after_step(*toy_step(state, next(batches)))
        state = run.after_step(*toy_step(state, next(batches)))
    assert list_steps(tmp_path) == [2]


@pytest.mark.parametrize(
    "resumed, start, traced", [(0, 1, [1, 2]), (0, 2, [2, 3]), (0, 10, [3, 4]), (3, 10, [4])]
)
def test_profile_traces_two_of_four_steps(tmp_path, monkeypatch, resumed, start, traced):
    """Counted from the step gone on from; the last ones, where fewer are left than it waits for."""
    tracing, seen = [False], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: tracing.append(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: tracing.append(False))
    window = ProfileWindow(epath.Path(tmp_path), start, 2)
    window.open(resumed, 4)
    for step in range(resumed + 1, 5):
        seen += [step] if tracing[-1] else []
        window.after_step(step, None)
    assert seen == traced and not tracing[-1]


def test_profile_is_written(tmp_path):
    run_toy(tmp_path, 4, profile_num_steps=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_restore_comes_first(tmp_path):
    run = Run(tmp_path, {}, RunConfig(), total_steps=1, tokens_per_step=1)
    with pytest.raises(RuntimeError, match="restore comes first"), run:
        run.after_step(toy_state(), {})


# --- config ---


def test_config_difference():
    old = {"model": {"width": 8, "layers": [1, 2]}, "seed": 0, "gone": None, "lost": 1}
    new = {"seed": 1, "model": {"width": 8, "layers": (1, 3)}, "new": {"x": True}}
    assert config_difference(old, new) == {
        "lost": (1, None),
        "model.layers": ([1, 2], [1, 3]),
        "new.x": (None, True),
        "seed": (0, 1),
    }
    assert config_difference(new, json.loads(json.dumps(new))) == {}


def make_run(workdir, config, **options):
    return Run(workdir, config, RunConfig(**options), total_steps=1, tokens_per_step=1)


def test_a_workdir_of_another_config_is_refused_at_construction(tmp_path):
    config = {"seed": 0, "model": {"width": 8}, "run": {"log_every_steps": 1}}
    with make_run(tmp_path, config):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == config
    make_run(tmp_path, config)
    other = config | {"seed": 3, "model": {"width": 16}}
    with pytest.raises(ConfigChangedError, match=r"model.width: 8 → 16; seed: 0 → 3\)"):
        make_run(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert not (tmp_path / "changes.jsonl").exists()


def test_an_override_is_recorded(tmp_path):
    with make_run(tmp_path, {"seed": 0}):
        pass
    with make_run(tmp_path, {"seed": 1}, allow_config_change=True):
        pass
    (row,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert row["forced"] and row["changes"] == {"seed": {"old": 0, "new": 1}}
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_what_does_not_change_learning_may_change(tmp_path):
    config = {"run": {"log_every_steps": 1}, "mesh": {"fsdp": 1}, "data": {"seed": 0}}
    with make_run(tmp_path, config):
        pass
    free = {"run": {"log_every_steps": 5}, "mesh": {"fsdp": 8}, "data": {"seed": 0}}
    assert check_config(tmp_path, free) == {"mesh.fsdp": (1, 8), "run.log_every_steps": (1, 5)}
    with make_run(tmp_path, free):
        pass
    with pytest.raises(ConfigChangedError, match="data.seed"):
        check_config(tmp_path, free | {"data": {"seed": 1}})
    assert not json.loads((tmp_path / "changes.jsonl").read_text())["forced"]


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match="config.json cannot be read"):
        make_run(tmp_path, {"seed": 0})


@pytest.mark.parametrize(
    ("field", "value"),
    [("log_every_steps", 0), ("save_every_steps", -1), ("save_every_seconds", 0.0),
     ("hang_timeout_seconds", 0.0), ("keep_newest_checkpoints", 0)],
)  # fmt: skip
def test_impossible_run_configs(field, value):
    with pytest.raises(ValueError, match=f"run.{field}={value}"):
        RunConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("save_every_seconds", 60.0), ("go_on_after_failed_save", True)]
)
def test_what_several_processes_cannot_agree_on_is_refused(field, value):
    config = RunConfig(**{field: value})
    config.check_processes(1)
    with pytest.raises(ValueError, match=f"run.{field}"):
        config.check_processes(2)
