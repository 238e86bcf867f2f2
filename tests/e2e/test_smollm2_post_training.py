"""The recipes that start from SmolLM2-135M-Instruct: two steps of each stage, at small shapes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from llm.data.packages import PackageError, smollm2_file
from llm.training.metrics import read_metrics

pytestmark = pytest.mark.slow
SHORT = ("--config.run.log_every_steps=1", "--config.total_steps=2")
WARM = ("--config.schedule.warmup_steps=1", "--config.compute.unroll_layers=False")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        smollm2_file()
    except PackageError as error:
        pytest.skip(f"SmolLM2's package cannot be had: {error}")
    return tmp_path_factory.mktemp("smollm2")


def run(folder, module, recipe, *arguments):
    """Run two steps of a recipe; return the rows of its metrics."""
    workdir = folder / module
    command = [sys.executable, "-m", f"experiments.{module}", f"--config=configs/{recipe}.py"]
    command += [*SHORT, *WARM, *map(str, arguments), f"--workdir={workdir}"]
    one_device = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=one_device)
    assert done.returncode == 0, done.stderr
    return [row for row in read_metrics(workdir) if "train/loss" in row]


@pytest.mark.long
def test_two_steps_of_every_stage(folder):
    chat = run(
        folder, "finetune", "finetune_smollm2", "--config.total_epochs=none",
        "--config.data.length_tokens=64", "--config.data.batch_sequences=2",
        "--config.evaluation.every_steps=0", "--config.evaluation.at_start=False",
    )  # fmt: skip
    # A model that reads and writes answers with one that it has never seen at some 3 nats a token,
    # far under the log 49,152 = 10.8 of chance.
    assert 1.0 < chat[0]["train/loss"] < 6.0
    small = (
        "--config.comparisons.length_tokens=64", "--config.comparisons.max_responses=2",
        "--config.comparisons.max_validation_prompts=2",
    )  # fmt: skip
    reward = run(
        folder, "reward", "reward_smollm2", f"--config.source={folder / 'finetune'}", *small,
        "--config.total_epochs=none", "--config.comparisons.batch_prompts=2",
        "--config.evaluate_every_steps=0",
    )  # fmt: skip
    # The head starts at zero: no answer is better than another.
    assert reward[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    steps = run(
        folder, "rlhf", "rlhf_smollm2", f"--config.source={folder / 'finetune'}",
        f"--config.rewards.reward.path={folder / 'reward'}",
        "--config.rewards.reward.batch_responses=4", "--config.rollout.prompts=2",
        "--config.rollout.group=2", "--config.rollout.response_tokens=8",
        "--config.algorithm.minibatches=2",
    )  # fmt: skip
    assert [row["step"] for row in steps] == [1, 2]
    assert steps[0]["rl/kl"] == pytest.approx(0.0, abs=1e-3)  # the reference is where it starts
    assert all(row["rl/log_prob_gap"] < 1e-3 for row in steps)
