"""PaLM's rule: a spike rewinds the run and leaves its batches out, once, however often it stops."""

import json
import os
import signal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.training.config import SpikeConfig
from llm.training.loading import verify
from llm.training.manifests import list_steps, read_ledger
from llm.training.metrics import read_metrics
from llm.training.run import Run
from llm.training.run_config import RunConfig
from llm.training.spikes import SpikeWatch

TOTAL = 30
RULE = SpikeConfig(deviations=12.0, window_steps=8, rewind_steps=3, skip_steps=5)


@flax.struct.dataclass
class State:
    params: jax.Array
    cursor: jax.Array


class Batches:
    """Four numbers near 1, a pure function of their place; in the poisoned places they are huge."""

    def __init__(self, poisoned: range):
        self.cursor, self._poisoned = 0, poisoned

    def seek(self, cursor: int) -> None:
        self.cursor = cursor

    def __next__(self):
        places = np.arange(self.cursor, self.cursor + 4)
        self.cursor += 4
        x = 1 + 0.1 * np.sin(places.astype(np.float32))
        x[[place in self._poisoned for place in places.tolist()]] = 50.0
        return {"x": x, "cursor": np.uint32(self.cursor)}


@jax.jit
def step(state, batch):
    loss = jnp.mean((batch["x"] - state.params) ** 2)
    params = state.params + 0.3 * jnp.mean(batch["x"] - state.params)
    return State(params, batch["cursor"]), {"train/loss": loss}


def train(
    workdir, rule=RULE, *, stop_after=10**6, poisoned=range(80, 92), seen=None, told_at=0, **options
):
    """Steps 21 to 23 read poisoned numbers. `seen` gathers (step, cursor) of what was learnt.

    `told_at`: the step that a SIGTERM comes in.
    """
    options = {"log_every_steps": 1, "save_every_steps": 2, "keep_newest_checkpoints": 4} | options
    run = Run(workdir, {}, RunConfig(**options), total_steps=TOTAL, tokens_per_step=4, spikes=rule)
    steps = 0
    with run:
        state, batches = run.restore(State(jnp.float32(0), jnp.uint32(0)), Batches(poisoned))
        while run.step < TOTAL and steps < stop_after:
            batch = next(batches)
            state, metrics = step(state, batch)
            if run.step + 1 == told_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if seen is not None:
                seen.append((run.step + 1, int(batch["cursor"])))
            state = run.after_step(state, metrics)
            steps += 1
    return float(state.params)


def facts(workdir):
    """What must not depend on interruptions: the checkpoints that count, the log, the skips."""
    newest = {row["step"]: row["state_digest"] for row in read_ledger(workdir)}
    log = [
        {name: x for name, x in row.items() if not name.startswith("perf/")}
        for row in read_metrics(workdir)
    ]
    skips = (workdir / "skipped_batches.jsonl").read_text()
    return newest, log, skips


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir, seen = tmp_path_factory.mktemp("whole"), []
    return workdir, train(workdir, seen=seen), seen


def test_a_spike_rewinds_and_leaves_its_batches_out(whole):
    workdir, params, seen = whole
    (skip,) = map(json.loads, (workdir / "skipped_batches.jsonl").read_text().splitlines())
    # The loss of step 21 is the first to rise; three steps back is 18; five batches are 20 numbers.
    assert (skip["spike_step"], skip["step"]) == (21, 18)
    assert (skip["from_cursor"], skip["to_cursor"]) == (72, 92)
    assert skip["loss"] > 1000 > 1 > skip["usual"]
    # Step 22 was under way when step 21's loss was read.
    assert seen[:22] == [(i, 4 * i) for i in range(1, 23)]
    assert seen[22:] == [(i, 4 * i + 20) for i in range(19, TOTAL + 1)]
    assert params == pytest.approx(1.0, abs=0.1)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, TOTAL + 1))
    assert max(row["train/loss"] for row in read_metrics(workdir)) < 2
    assert all(not report.problems for report in verify(workdir))


@pytest.mark.parametrize(
    "stop_after", [21, *(pytest.param(step, marks=pytest.mark.long) for step in (20, 22))]
)
def test_a_run_stopped_around_the_spike_is_the_same(whole, tmp_path, stop_after):
    train(tmp_path, stop_after=stop_after)
    train(tmp_path)
    assert facts(tmp_path) == facts(whole[0])


def test_killed_between_record_and_deletion_it_leaves_the_spiked_steps(whole, tmp_path):
    """The record is written before steps are deleted: what a kill leaves is not gone on with."""
    train(tmp_path, SpikeConfig(), stop_after=24)
    (tmp_path / "skipped_batches.jsonl").write_text(facts(whole[0])[2])
    train(tmp_path)
    assert facts(tmp_path)[1] == facts(whole[0])[1]
    assert facts(tmp_path)[0][TOTAL] == facts(whole[0])[0][TOTAL]


def test_replayed_from_its_record_without_the_rule_it_is_the_same(whole, tmp_path):
    (tmp_path / "skipped_batches.jsonl").write_text(facts(whole[0])[2])
    seen = []
    train(tmp_path, SpikeConfig(), seen=seen)
    assert facts(tmp_path)[0][TOTAL] == facts(whole[0])[0][TOTAL]
    assert facts(tmp_path)[1] == facts(whole[0])[1]
    assert seen == whole[2][:18] + whole[2][22:]


def test_what_spikes_again_in_the_same_place_is_trained_through(tmp_path):
    """It was not those batches: from step 15 on, whatever is read is huge."""
    train(tmp_path, poisoned=range(60, 10**6))
    rows = (tmp_path / "skipped_batches.jsonl").read_text().splitlines()
    assert len(rows) == 1
    assert read_metrics(tmp_path)[-1]["step"] == TOTAL


def test_steps_saved_for_signals_do_not_push_out_the_one_to_go_back_to(tmp_path):
    rule = SpikeConfig(deviations=12.0, window_steps=8, rewind_steps=6, skip_steps=9)
    for name in ("whole", "told"):
        (tmp_path / name).mkdir()
        for told_at in (15, 17, 19) if name == "told" else ():
            with pytest.raises(SystemExit):
                train(tmp_path / name, rule, told_at=told_at, keep_newest_checkpoints=5)
        train(tmp_path / name, rule, keep_newest_checkpoints=5)
    whole, told = facts(tmp_path / "whole"), facts(tmp_path / "told")
    assert json.loads(whole[2])["step"] == 14
    assert whole[1:] == told[1:] and whole[0].items() <= told[0].items()


def test_what_is_deleted_on_going_back_is_not_missed(tmp_path, caplog):
    """Killed while it saves a step again that it had before the spike."""
    train(tmp_path, SpikeConfig(), stop_after=22)
    (tmp_path / "skipped_batches.jsonl").write_text(
        json.dumps(dict(step=18, from_cursor=72, to_cursor=92, spike_step=21, loss=9, usual=1))
    )
    train(tmp_path, stop_after=1)
    unfinished = tmp_path / "checkpoints" / "20"
    assert not unfinished.exists()
    unfinished.mkdir()
    train(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("corrupt-*")) and "corrupt" not in caplog.text
    assert all(not report.problems for report in verify(tmp_path))


def test_without_a_checkpoint_before_it_training_goes_on(tmp_path, capfd):
    train(tmp_path, save_every_steps=30, poisoned=range(112, 120))  # steps 29 and 30
    assert list_steps(tmp_path) == [30]  # the spike before it does not hold it up
    assert not (tmp_path / "skipped_batches.jsonl").exists()
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("step 29: the loss rose") == 1 and "step 30: the loss rose" not in said
    assert "No checkpoint is at step 0 or before" in said


def test_a_later_rewind_to_before_an_earlier_one_makes_it_void(tmp_path):
    watch = SpikeWatch(SpikeConfig(deviations=3.0, window_steps=3, skip_steps=2), tmp_path)

    def spike(at, sequences):
        for _ in range(3):
            watch.observe(at - 1, 1.0, (0, 4))
        watch.observe(at, 9.0, sequences)
        assert watch.spike.step == at

    spike(30, (116, 120))
    watch.record(28, 112, write=True)
    assert watch.jump(28) == 120 and watch.jump(27) is None
    spike(40, (160, 164))
    watch.record(20, 80, write=True)
    assert watch.jump(20) == 164 and watch.jump(28) is None
    assert SpikeWatch(None, tmp_path).skips == watch.skips
