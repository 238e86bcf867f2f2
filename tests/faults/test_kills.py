"""Killed at random times, a run ends bitwise where the unbroken one does.

benchmarks/faults.py does the same to every stage, more than a hundred times.
"""

import random
import time

import pytest

from tests.faults.harness import SAVE_EVERY_STEPS, make_life, outcome, run_with_kills

STEPS = "--config.total_steps=24"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    make_life(folder, {"pretrain": (STEPS,)})
    return folder


@pytest.mark.slow
def test_kill_9_at_random_times(folder):
    seed = time.time_ns()
    print("seed", seed)
    workdir = folder / "pretrain_killed"
    kills = run_with_kills("pretrain", folder, workdir, random.Random(seed), 3, STEPS)
    assert kills
    assert outcome(workdir) == outcome(folder / "pretrain")
    # One interval, and while a save is under way the one before it.
    assert all(k.logged_step - k.committed_step <= 2 * SAVE_EVERY_STEPS for k in kills)
