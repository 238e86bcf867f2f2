"""The real pretraining entry point under faults: it ends bitwise where the unbroken run does.

benchmarks/faults.py kills every stage, more than a hundred times.
"""

import random
import shutil
import signal
import time

import pytest

from llm.training.manifests import list_steps
from llm.training.metrics import read_metrics
from tests.faults.harness import (
    SAVE_EVERY_STEPS,
    finish,
    make_life,
    outcome,
    run_with_kills,
    start,
    wait_until,
)

FLAGS = ("--config.total_steps=24", "--config.run.replay_every_steps=6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    make_life(folder, {"pretrain": FLAGS})
    return folder


@pytest.mark.slow
def test_kill_9_at_random_times(folder):
    seed = time.time_ns()
    print("seed", seed)
    workdir = folder / "pretrain_killed"
    kills = run_with_kills("pretrain", folder, workdir, random.Random(seed), 2, *FLAGS)
    assert kills
    assert outcome(workdir) == outcome(folder / "pretrain")
    # One interval, and while a save is under way the one before it.
    assert all(k.logged_step - k.committed_step <= 2 * SAVE_EVERY_STEPS for k in kills)


SLOW_SAVES = """
import time, llm.training.manifests as m
real = m.hash_files
def slow(*arguments, **options):
    time.sleep(0.7)
    return real(*arguments, **options)
m.hash_files = slow
"""


@pytest.mark.slow
@pytest.mark.long
def test_more_signals_in_the_middle_of_the_last_save_are_safe(folder):
    workdir = folder / "pretrain_preempted"
    child = start("pretrain", folder, workdir, *FLAGS, patch=SLOW_SAVES)
    wait_until(lambda: len(read_metrics(workdir)) >= 3, child)
    child.send_signal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):  # saving takes more than twice as long
        time.sleep(0.3)
        child.send_signal(number)
    said = finish(child, expect=75)
    assert "already saving" in said
    step = read_metrics(workdir)[-1]["step"]
    assert list_steps(workdir)[-1] == step and f"step {step} is saved" in said
    finish(start("pretrain", folder, workdir, *FLAGS))
    odd = {row["step"] for row in outcome(workdir)[".: ledger"]} - set(range(0, 25, 2))
    ours, unbroken = outcome(workdir), outcome(folder / "pretrain")
    # The step that was saved on the way out is one more, where saves are at even steps.
    assert odd <= {step}
    ours[".: ledger"] = [row for row in ours[".: ledger"] if row["step"] not in odd]
    assert ours == unbroken


SPIKES = (
    "--config.spikes.deviations=6",
    "--config.spikes.window_steps=5",
    "--config.spikes.rewind_steps=3",
    "--config.spikes.skip_steps=4",
    "--config.run.keep_newest_checkpoints=4",
)
OTHER_TARGETS_IN_STEP_FIFTEEN = """
import llm.data.loader as loader
real_next = loader.Batches.__next__
def other_targets(self):
    batch = real_next(self)
    if batch["cursor"] == 60:
        batch["targets"] = (7 * batch["targets"] + 13) % 256
    return batch
loader.Batches.__next__ = other_targets
"""


@pytest.mark.long
def test_a_loss_spike_is_gone_around_killed_or_not(folder):
    """Killed or not, or a replay that only follows the record: the same run."""
    runs = [folder / f"pretrain_spiked_{name}" for name in ("whole", "killed", "replayed")]
    flags = (*FLAGS, *SPIKES)
    poisoned = {"patch": OTHER_TARGETS_IN_STEP_FIFTEEN}
    said = " ".join(finish(start("pretrain", folder, runs[0], *flags, **poisoned)).split())
    assert "step 15: the loss rose from" in said
    assert "Going on from step 12, without sequences 48 to 63 of the data" in said
    run_with_kills("pretrain", folder, runs[1], random.Random(0), 1, *flags, **poisoned)
    runs[2].mkdir()
    shutil.copy(runs[0] / "skipped_batches.jsonl", runs[2])
    finish(start("pretrain", folder, runs[2], *FLAGS, "--config.run.keep_newest_checkpoints=4"))
    ends = [outcome(run) for run in runs]
    assert ends[0][".: ledger"][-1] == ends[1][".: ledger"][-1]
    for end in ends[1:]:
        assert end[".: metrics"] == ends[0][".: metrics"]
        # Of another config, which the ledger names: with the rule, or without it.
        assert end[".: ledger"][-1]["state_digest"] == ends[0][".: ledger"][-1]["state_digest"]


FLIP_A_BIT_OF_A_GRADIENT_ONCE = """
import jax, jax.numpy as jnp, numpy as np
import llm.training.step as s
real, calls = s.accumulate, []
def count_and_flip(x):
    calls.append(1)
    flipped = np.array(x)
    if len(calls) == 7:  # of step 6 the second time
        flipped.view(np.uint32).reshape(-1)[3] ^= np.uint32(1 << 20)
    return flipped
def faulty(loss_fn, params, batch, key, accumulate_steps):
    grads, objective, sums = real(loss_fn, params, batch, key, accumulate_steps)
    leaves, tree = jax.tree.flatten(grads)
    shape = jax.ShapeDtypeStruct(leaves[0].shape, leaves[0].dtype)
    leaves[0] = jax.pure_callback(count_and_flip, shape, leaves[0])
    return jax.tree.unflatten(tree, leaves), objective, sums
s.accumulate = faulty
"""


@pytest.mark.long
def test_a_bit_of_a_gradient_flipped_once_names_the_step(folder):
    workdir = folder / "pretrain_flipped"
    child = start("pretrain", folder, workdir, *FLAGS, patch=FLIP_A_BIT_OF_A_GRADIENT_ONCE)
    said = " ".join(finish(child, expect=2).split())
    assert "step 6 was taken twice and differs" in said and "state/params/" in said
    assert list_steps(workdir)[-1] == 4
    finish(start("pretrain", folder, workdir, *FLAGS))
    assert outcome(workdir) == outcome(folder / "pretrain")
