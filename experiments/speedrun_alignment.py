"""The speedrun's second half: instructions, reward models, DPO and PPO, and what a judge finds.

The judge and the second reward model learn from labels that no policy and no reward has seen.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from configs.schema import SpeedrunConfig
from experiments.finetune import finetune
from experiments.loading import load_model
from experiments.preference import train_on_preferences
from experiments.reward import REPORT, train_reward
from experiments.rewards import load_reward
from experiments.rlhf import rlhf
from experiments.stages import Stages
from llm.data.config import SourceConfig
from llm.data.disk import read_json_object
from llm.data.rows import tell_rows
from llm.evaluation.judge import Judge, distinct_n, labelled_texts
from llm.generation.config import SamplingConfig
from llm.generation.generator import Completion, Generator
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer
from llm.rl.prompts import Prompt, load_prompts
from llm.rl.reward_model import make_model_reward
from llm.rl.rewards import RewardFn
from llm.training.metrics import read_metrics

POLICIES = ("pretrain", "sft", "dpo", "ppo")


def align(config: SpeedrunConfig, workdir: epath.Path, stages: Stages) -> dict[str, Any]:
    """Run what follows pretraining; return the figures of every stage."""
    judge = make_judge(config)
    real = stages.run("judge", lambda: judge_real_texts(config, judge))
    stages.run("sft", lambda: finetune(_from(config.finetune, workdir), str(workdir / "sft")))
    for name, split in (("reward", None), ("reward_judge", config.judge.training.split)):
        stages.run(name, lambda n=name, s=split: _train_reward(config, workdir, n, s))
    stages.run(
        "dpo",
        lambda: train_on_preferences(_from(config.preference, workdir), str(workdir / "dpo")),
    )
    stages.run("ppo", lambda: _improve(config, workdir, judge))
    found = {
        name: stages.run(f"judge {name}", lambda n=name: judge_policy(config, workdir, n, judge))
        for name in POLICIES
    }
    curve = reward_curve(workdir)
    return {"judge_on_real": real["agreement"], "policies": found, "curve": curve}


def make_judge(config: SpeedrunConfig) -> Judge:
    """Return the judge, fitted anew: a second's work."""
    texts, labels = _labelled(config, config.judge.training)
    return Judge(texts, labels, by_characters=config.judge.by_characters)


def judge_real_texts(config: SpeedrunConfig, judge: Judge) -> dict[str, float]:
    """Return how often the judge agrees with the labels of real responses it has not seen."""
    texts, labels = _labelled(config, config.judge.asked)
    return {"agreement": judge.agreement(texts, labels), "texts": len(texts)}


def judge_policy(
    config: SpeedrunConfig, workdir: epath.Path, name: str, judge: Judge
) -> dict[str, Any]:
    """Return what judge and reward models find in a policy's responses to held-out prompts."""
    loaded = load_model(str(workdir / name))
    prompts = asked_prompts(config, loaded.tokenizer)
    answers = respond(config, loaded, prompts)
    texts = [answer.text for answer in answers]
    asked = [str(prompt.fields[config.judge.label_field]) for prompt in prompts]
    scores = {
        reward: float(np.mean(_scorer(config, workdir / reward)(prompts, texts)))
        for reward in ("reward", "reward_judge")
    }
    return {
        "instruction_following": judge.agreement(texts, asked),
        "reward": scores["reward"],
        "reward_judge": scores["reward_judge"],
        "distinct_2": distinct_n([answer.tokens for answer in answers], 2),
        "response_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
        "ended_by_eos": float(np.mean([answer.finished for answer in answers])),
        "samples": [
            {"prompt": prompt.text, "text": text}
            for prompt, text in list(zip(prompts, texts, strict=True))[
                : config.num_alignment_samples
            ]
        ],
    }


def asked_prompts(config: SpeedrunConfig, tokenizer) -> list[Prompt]:
    """Return the held-out prompts, over and over up to the number that is judged."""
    asked = config.judge.asked
    source = dataclasses.replace(asked, kept_fields=(*asked.kept_fields, config.judge.label_field))
    found = load_prompts(
        source, tokenizer, max_tokens=config.rlhf.rollout.prompt_tokens, max_bad_rows=0
    ).prompts
    return [found[i % len(found)] for i in range(config.judge.num_responses)]


def respond(config: SpeedrunConfig, loaded, prompts: list[Prompt]) -> list[Completion]:
    """Return responses, sampled as PPO's are; the same for the same model."""
    rollout = config.rlhf.rollout
    sampling = SamplingConfig(rollout.response_tokens, temperature=rollout.temperature)
    model = Transformer(loaded.config, config.pretrain.compute)
    generator = Generator(model, loaded.tokenizer, sampling)
    params, key = jax.device_put(loaded.params), jax.random.key(config.judge.seed)
    return generator.complete(params, [prompt.tokens for prompt in prompts], key)


def reward_curve(workdir: epath.Path) -> list[dict[str, float]]:
    """Return, by step of PPO, nats from the reference, the reward it had and the judge's share."""
    names = {"rl/kl": "kl", "rl/reward/reward": "proxy", "rl/reward/judge": "judge"}
    return [
        {"step": row["step"]} | {ours: row[theirs] for theirs, ours in names.items()}
        for row in read_metrics(workdir / "ppo")
        if all(name in row for name in names)
    ]


def _labelled(config: SpeedrunConfig, source: SourceConfig) -> tuple[list[str], list[str]]:
    found = labelled_texts(source, config.judge.label_field)
    if found.bad_rows:
        print(f"judge: {tell_rows(found.bad_rows, 'bad rows left out')}")
    return found.texts, found.labels


def _improve(config: SpeedrunConfig, workdir: epath.Path, judge: Judge) -> None:
    """Run PPO against the first reward model, with the judge looking on."""
    recipe = _from(config.rlhf, workdir)
    rewards = {
        name: dataclasses.replace(reward, path=str(workdir / reward.path))
        for name, reward in recipe.rewards.items()
    }
    value_source = str(workdir / recipe.value_source) if recipe.value_source else ""
    recipe = dataclasses.replace(recipe, rewards=rewards, value_source=value_source)

    def follows(prompts: list[Prompt], responses: list[str]) -> list[float]:
        asked = [str(prompt.fields[config.judge.label_field]) for prompt in prompts]
        return [float(a == b) for a, b in zip(judge(responses), asked, strict=True)]

    watched: dict[str, RewardFn] = {"judge": follows}
    rlhf(recipe, str(workdir / "ppo"), watched=watched)


def _train_reward(
    config: SpeedrunConfig, workdir: epath.Path, name: str, split: str | None
) -> dict[str, Any]:
    recipe = _from(config.reward, workdir)
    if split is not None:
        source = dataclasses.replace(recipe.comparisons.source, split=split)
        comparisons = dataclasses.replace(recipe.comparisons, source=source)
        recipe = dataclasses.replace(recipe, comparisons=comparisons)
    train_reward(recipe, str(workdir / name))
    return read_report(workdir / name)


def read_report(workdir: epath.Path) -> dict[str, Any]:
    """Return a reward model's held-out figures."""
    return read_json_object(workdir / REPORT)


def _scorer(config: SpeedrunConfig, workdir: epath.Path) -> RewardFn:
    loaded = load_reward(str(workdir))
    model = ScalarModel(loaded.config, config.pretrain.compute)
    return make_model_reward(
        model, loaded.merged, loaded.tokenizer, shift=loaded.shift, scale=loaded.scale
    )


def _from(stage: Any, workdir: epath.Path) -> Any:
    """Return a stage's config with its source below the job's directory."""
    return dataclasses.replace(stage, source=str(workdir / stage.source))
