"""finetune, reward, preference and rlhf as a user runs them: one after the other on a tiny model.

Each is also broken off in the middle and gone on with, and ends bitwise where the unbroken one did.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs.command_line import load_config
from configs.schema import RewardModelConfig, RlhfConfig
from experiments.feedback import load_comparisons
from experiments.loading import load_model_config
from experiments.rewards import load_reward, load_rewards, load_value_start, weight_of
from llm.data.tokenizer_files import load_tokenizer
from llm.data.tokenizer_training import byte_tokenizer, train_tokenizer
from llm.models.config import ComputeConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer
from llm.rl.config import RewardConfig
from llm.rl.models import Models
from llm.rl.prompts import Prompt
from llm.training.loading import load_params
from llm.training.manifests import read_manifest
from llm.training.metrics import read_metrics
from tests.e2e.life import (
    AFTER_TWO_STEPS,
    BETWEEN_ROLLOUT_AND_UPDATE,
    WATCH_COMPILATIONS,
    module_of,
    patched,
    write_life,
)

ENVIRONMENT = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}


def run(module, *arguments, expect=0, code=None):
    start = ["-m", f"experiments.{module}"] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with data of every stage, recipes for it, and a pretrained model of bytes."""
    folder = tmp_path_factory.mktemp("life")
    write_life(folder)
    run("pretrain", *recipe(folder, "pretrain"), f"--workdir={folder / 'pretrain'}")
    return folder


def recipe(folder, stage):
    return (f"--config={folder / 'recipes.py'}:{stage}",)


ORDER = ("finetune", "reward", "preference", "rlhf", "rlhf_dynamic")


@pytest.fixture(scope="module")
def whole(folder):
    """Every stage run in one go."""
    for stage in ORDER:
        code = patched(stage, WATCH_COMPILATIONS) if stage == "rlhf_dynamic" else None
        arguments = (*recipe(folder, stage), f"--workdir={folder / stage}")
        done = run(module_of(stage), *arguments, code=code)
        (folder / f"{stage}.log").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.slow
# The stages share Run; one stands for the others here, benchmarks/faults.py kills them all.
@pytest.mark.parametrize(
    "stage",
    [
        stage if stage == "rlhf_dynamic" else pytest.param(stage, marks=pytest.mark.long)
        for stage in ORDER
    ],
)
def test_a_broken_run_ends_where_the_unbroken_one_does(whole, stage):
    workdir = whole / f"{stage}_broken"
    module, arguments = module_of(stage), (*recipe(whole, stage), f"--workdir={workdir}")
    patch, code = (BETWEEN_ROLLOUT_AND_UPDATE, -9) if module == "rlhf" else (AFTER_TWO_STEPS, 75)
    run(module, *arguments, expect=code, code=patched(stage, patch))
    run(module, *arguments)
    assert load_params(workdir).digest == load_params(whole / stage).digest
    assert load_params(workdir).step == 4
    ours, theirs = (
        [
            {k: v for k, v in row.items() if not k.startswith("perf/") and k != "time"}
            for row in read_metrics(path)
        ]
        for path in (workdir, whole / stage)
    )
    assert ours == theirs


def test_what_each_stage_leaves(whole):
    said = (whole / "finetune.log").read_text()
    assert "say sun|" in said
    for stage in ("reward", "preference"):
        said = (whole / f"{stage}.log").read_text()
        assert "1 bad rows left out: " in said
        assert "feedback.jsonl:25 two responses are identical, and one is said to be" in said
        assert "length_tokens=32: " in said and "feedback.jsonl:26\n" in said
    report = json.loads((whole / "reward" / "preferences.json").read_text())
    assert 0 <= report["accuracy"] <= 1 and report["pairs"] > 0
    scale = json.loads((whole / "reward" / "scale.json").read_text())
    assert np.isfinite(scale["shift"]) and scale["scale"] > 0
    assert set(json.loads((whole / "rlhf" / "identity" / "data.json").read_text())) == {
        "prompts",
        "rewards.rule",
        "source",
        "tokenizer",
    }


LOGGED = """rl/score rl/reward rl/reward/rule rl/kl rl/kl_k3 rl/kl_coefficient rl/entropy rl/ratio
rl/clip_fraction rl/approx_kl rl/response_tokens rl/ended_by_eos rl/log_prob_gap rl/updates
perf/generation_seconds perf/scoring_seconds perf/learning_seconds perf/tokens_per_second
train/loss train/grad_norm train/learning_rate"""
MORE = {
    "rlhf": "rl/explained_variance rl/value rl/value_loss rl/value_clip_fraction",
    "rlhf_dynamic": "rl/reward/vowels rl/informative_groups rl/ptx_loss",
}


@pytest.mark.parametrize("stage, responses", [("rlhf", 4), ("rlhf_dynamic", 8)])
def test_every_step_of_a_policys_run_logs_what_it_did(whole, stage, responses):
    rows = read_metrics(whole / stage)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        missing = {*LOGGED.split(), *MORE[stage].split()} - row.keys()
        assert not missing
        parts = ("generation", "scoring", "learning")
        seconds = sum(row[f"perf/{part}_seconds"] for part in parts)
        tokens = row["rl/response_tokens"] * responses  # and not the 6 that each has room for
        assert row["perf/tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)


def test_a_policys_run_compiles_in_its_first_step_alone(whole):
    first, *others = json.loads((whole / "rlhf_dynamic" / "compiled.json").read_text())
    programs = {"jit(sample)", "jit(scores_of)", "jit(learn)"}
    assert programs <= set(first) and len(others) == 4
    assert not programs & {name for step in others for name in step}


def test_further_prompts_were_drawn(whole):
    (newest,) = epath.Path(whole / "rlhf_dynamic" / "checkpoints").glob("*4")
    assert read_manifest(newest)["cursor"] > 4 * 4


def test_a_value_starts_at_what_the_run_is_paid(whole):
    source = str(whole / "reward")
    reward = load_reward(source)
    config = dataclasses.replace(reward.config, dropout_rate=0.0)
    models = Models(Transformer(config), ScalarModel(config))
    value = load_value_start(source, models, reward.tokenizer, weight=-2.0)
    tokens = jnp.asarray([reward.tokenizer.encode("sun and sea and sand")])
    raw, paid = (models.value.apply({"params": p}, tokens) for p in (reward.merged, value))
    scale = json.loads((whole / "reward" / "scale.json").read_text())
    assert scale["shift"] != 0 and scale["scale"] != 1 and np.ptp(raw) > 0
    expected = -2.0 * (np.asarray(raw) - scale["shift"]) / scale["scale"]
    np.testing.assert_allclose(paid, expected, rtol=1e-4, atol=1e-5)
    rewards = {
        "judge": RewardConfig(path=source + "/", weight=0.5),
        "rule": RewardConfig(kind="pattern", path=source, weight=7.0),
    }
    config = RlhfConfig(source="x", rewards=rewards)
    assert weight_of(source, config) == 0.5 and weight_of("elsewhere", config) == 1.0


def test_held_out_prompts_may_be_fewer_and_do_not_hang_on_the_seed(folder):
    config = load_config(f"{folder / 'recipes.py'}:reward", [], RewardModelConfig)

    def held_out(**fields):
        comparisons = dataclasses.replace(config.comparisons, **fields)
        asked = dataclasses.replace(config, comparisons=comparisons)
        found, _ = load_comparisons(asked, byte_tokenizer(), pairs_only=True)
        return [record.id for record in found["validation"]]

    every, few = held_out(), held_out(max_validation_prompts=2)
    assert len(every) > 2 == len(few) and set(few) < set(every)
    assert held_out(max_validation_prompts=2, seed=7) == few
    with pytest.raises(ValueError, match="max_validation_prompts=0: must be positive"):
        held_out(max_validation_prompts=0)
    with pytest.raises(ValueError, match="no train feedback fits into .*length_tokens=9; raise"):
        held_out(length_tokens=9)


def test_direct_preferences_begin_at_log_2(whole):
    """By their own loss, before the first update: DPO's policy is its reference."""
    first = next(row for row in read_metrics(whole / "preference") if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method, first", [("kto", 0.5), ("orpo", None)])
def test_other_direct_preferences_run(whole, method, first):
    """First losses at β = 0.1: KTO's 1 − σ(0), IPO's (1/2β)²."""
    workdir = whole / method
    arguments = ("--config.preference.method=" + method, "--config.total_steps=2")
    run("preference", *recipe(whole, "preference"), *arguments, f"--workdir={workdir}")
    losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert first is None or losses[0] == pytest.approx(first, rel=1e-4)


def test_a_value_that_reads_other_tokens_is_refused(whole, tmp_path):
    """A reward may: it encodes texts anew. A value reads the policy's own tokens."""
    other = tmp_path / "reward"
    shutil.copytree(whole / "reward", other)
    assert byte_tokenizer().definition == load_tokenizer(other / "tokenizer").definition
    shutil.rmtree(other / "tokenizer")
    train_tokenizer(["sun sea sky sand wind"] * 9, 290).save(other / "tokenizer")
    config = f"{whole / 'recipes.py'}:rlhf"
    rlhf = load_config(config, [], RlhfConfig)
    models = Models(
        Transformer(load_model_config(whole / "finetune")),
        ScalarModel(load_model_config(other)),
    )
    with pytest.raises(ValueError, match="has another tokenizer than the policy, whose tokens"):
        load_value_start(str(other), models, byte_tokenizer())
    asked = dataclasses.replace(rlhf.rewards["rule"], path=str(other))
    rewards, _ = load_rewards(dataclasses.replace(rlhf, rewards={"r": asked}), ComputeConfig())
    prompt = Prompt(({"role": "user", "content": "say sun"},), (1, 2), {}, "pairs.jsonl:1")
    assert np.isfinite(rewards["r"][0]([prompt], ["sun 1"])).all()


def test_policies_speak_and_reward_models_do_not(whole):
    for stage in ("finetune", "preference", "rlhf"):
        run("generate", f"--workdir={whole / stage}", "--prompt=say sun", "--max_new_tokens=3")
    done = run("generate", f"--workdir={whole / 'reward'}", "--prompt=x", expect=2)
    assert "holds a reward model, which scores texts and writes none" in done.stderr


@pytest.mark.parametrize(
    "stage, override, message",
    [
        ("finetune", "--config.adapter.rnak=2", "no field 'rnak'; did you mean rank?"),
        ("finetune", "--config.source=nowhere", "nowhere does not exist; give a Hugging Face"),
        ("finetune", "--config.trainable.freeze=('layer/*',)", "'layer/*' matches no parameter"),
        ("reward", "--config.comparisons.kind=thumbs", "26 rows are bad"),
        ("preference", "--config.preference.method=dop", "must be one of"),
        ("rlhf", "--config.algorithm.minibatches=3", "is not a multiple of"),
        ("rlhf", "--config.rewards.rule.path=nowhere", "not the workdir of a finished reward"),
        ("rlhf", "--config.algorithm.name=grpo", "set whiten_advantages=False"),
        ("rlhf_dynamic", "--config.rollout.group=1", "rollout.group=1 must be at least 2"),
        ("rlhf_dynamic", "--config.ptx.batch_sequences=5", "multiple of algorithm.minibatches"),
    ],
)
def test_mistakes_are_one_line(whole, stage, override, message):
    arguments = (*recipe(whole, stage), override, f"--workdir={whole / 'mistake'}")
    done = run(module_of(stage), *arguments, expect=2)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_reward_model_that_changed_is_noticed(whole, tmp_path):
    """The run goes on only with the very models that it began with."""
    frozen = whole / "rlhf" / "identity" / "data.json"
    before = frozen.read_text()
    frozen.write_text(before.replace(json.loads(before)["rewards.rule"], "0" * 16))
    done = run("rlhf", *recipe(whole, "rlhf"), f"--workdir={whole / 'rlhf'}", expect=2)
    frozen.write_text(before)
    assert "made with other data (rewards.rule: 0000000000000000 → " in done.stderr
