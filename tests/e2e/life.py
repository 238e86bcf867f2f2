"""A tiny model's whole life: its data, its recipes, and entry points broken off or looked into."""

import json
import pathlib

import numpy as np

RECIPES = """
from configs import finetune_tiny, preference_tiny, pretrain_tiny, reward_tiny, rlhf_tiny
from configs.dataclass_config import to_config_dict
from configs.schema import ScalingConfig
from llm.data.config import SourceConfig
from llm.models.presets import from_depth
from llm.rl.config import RewardConfig
from llm.scaling.config import LadderConfig
from llm.training.config import OptimizerConfig, ScheduleConfig

FOLDER, LENGTH = {folder!r}, {length}


def source(name, **fields):
    path = FOLDER + "/" + name + ".jsonl"
    return to_config_dict(SourceConfig(paths=(path,), validation_fraction=0.25, **fields))


def get_config(stage):
    if stage == "scaling":
        return scaling()
    config = globals()[stage]()
    config.run.log_every_steps = 1
    config.run.save_every_steps = 2
    config.schedule.warmup_steps = 1
    return config


def pretrain():
    config = pretrain_tiny.get_config()
    config.model = to_config_dict(from_depth(1, vocab_size=300, max_length_tokens=LENGTH))
    config.data.sources = {{"text": source("text")}}
    config.data.tokenizer.kind = "bytes"
    config.data.cache_dir = FOLDER + "/cache"
    config.data.length_tokens, config.data.batch_sequences = LENGTH, 4
    config.total_steps = 2
    config.schedule.decay_steps = 1
    config.evaluation.every_steps, config.evaluation.prompts = 0, ()
    return config


def finetune():
    config = finetune_tiny.get_config()
    config.source = FOLDER + "/pretrain"
    config.data.sources = {{"pairs": source("pairs", format="prompt_response")}}
    config.data.cache_dir = FOLDER + "/cache"
    config.data.length_tokens, config.data.batch_sequences = LENGTH, 4
    config.total_epochs, config.total_steps = None, 4
    config.evaluation.every_steps = 4
    config.evaluation.prompts = ("say sun",)
    config.evaluation.sample_tokens = 4
    return config


def comparisons(config):
    config.source = FOLDER + "/finetune"
    config.comparisons.source = source("feedback", format="feedback")
    config.comparisons.length_tokens = 32
    config.comparisons.batch_prompts = 4
    config.comparisons.max_responses = 2
    config.total_epochs, config.total_steps = None, 4
    config.evaluate_every_steps = 4
    return config


def reward():
    return comparisons(reward_tiny.get_config())


def preference():
    return comparisons(preference_tiny.get_config())


def rlhf():
    config = rlhf_tiny.get_config()
    config.source = FOLDER + "/finetune"
    config.value_source = FOLDER + "/reward"
    config.prompts = source("pairs", format="prompt_response")
    config.rewards.rule.kind = "model"
    config.rewards.rule.path = FOLDER + "/reward"
    config.rollout.prompts, config.rollout.response_tokens = 4, 6
    config.total_steps = 4
    config.samples_every_steps = 2
    return config


def rlhf_dynamic():
    # All that has a state of its own: draws, scale, a steered coefficient, text beside rewards.
    config = rlhf()
    config.value_source = ""
    vowels = RewardConfig(kind="pattern", path=".*[aeiou].*")
    watched = RewardConfig(kind="model", path=FOLDER + "/reward", weight=0.0)
    config.rewards = {{"vowels": to_config_dict(vowels), "rule": to_config_dict(watched)}}
    config.rollout.group = 2
    config.algorithm.name = "grpo"
    config.algorithm.whiten_advantages = False
    config.algorithm.scale_scores = True
    config.algorithm.dynamic_draws = 2
    config.algorithm.ptx_weight = 0.5
    config.kl.target_nats, config.kl.horizon_responses = 0.05, 100
    config.ptx.sources = {{"text": source("text")}}
    config.ptx.cache_dir = FOLDER + "/cache"
    config.ptx.length_tokens, config.ptx.batch_sequences = LENGTH, 4
    return config


def scaling():
    common = dict(width_per_layer=16, head_dim=8, optimizer=OptimizerConfig(learning_rate=1e-2),
                  schedule=ScheduleConfig(name="linear", warmup_steps=1))
    config = to_config_dict(ScalingConfig(ladders={{
        "rates": LadderConfig(depths=(1, 2), num_layers=1, tokens=(6000,),
                              learning_rates=(1e-2, 3e-2), **common),
        "single": LadderConfig(depths=(1,), tokens=(6000,), learning_rates=(1e-2,), **common),
    }}))
    config.data.sources = {{"text": source("text")}}
    config.data.tokenizer.kind = "bytes"
    config.data.cache_dir = FOLDER + "/cache"
    config.data.length_tokens, config.data.batch_sequences = LENGTH, 4
    config.num_evaluations = 4
    config.run.log_every_steps = 1
    config.run.save_every_steps = 2
    return config
"""

LENGTH = 48


def write_life(folder: pathlib.Path) -> None:
    """Write the data of every stage, and recipes.py for it."""
    random = np.random.default_rng(0)
    words = ["sun", "sea", "sky", "sand", "wind"]
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(30):
            file.write(json.dumps({"text": " ".join(random.choice(words, 40))}) + "\n")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(40):
            row = {"prompt": f"say {words[i % 5]}", "response": f"{words[i % 5]} {i}"}
            file.write(json.dumps(row) + "\n")
        file.write('{"prompt": "no answer"}\n')
    with (folder / "feedback.jsonl").open("w") as file:
        for i in range(24):
            good, bad = words[i % 5], words[(i + 1) % 5]
            row = {"prompt": f"say {i}", "chosen": f"{good} {i}", "rejected": f"{bad}"}
            file.write(json.dumps(row) + "\n")
        for answers in (("same", "same"), ("sun", "x" * 40)):
            row = dict(zip(("prompt", "chosen", "rejected"), ("say", *answers), strict=True))
            file.write(json.dumps(row) + "\n")
    (folder / "recipes.py").write_text(RECIPES.format(folder=str(folder), length=LENGTH))


CONFIGS = {
    "pretrain": "PretrainConfig",
    "finetune": "FinetuneConfig",
    "reward": "RewardModelConfig",
    "preference": "DirectPreferenceConfig",
    "rlhf": "RlhfConfig",
}
PATCHED = """
import sys, os, signal
import experiments.{module} as stage, llm.training.run as r
from experiments import entry
import configs.schema as schema
{patch}
entry.run(stage.main, schema.{config})
"""
# What is compiled in each step, by name.
WATCH_COMPILATIONS = """
import json, logging, jax
compiled = [[]]
class Watch(logging.Handler):
    def emit(self, record):
        _, found, name = record.getMessage().partition("XLA compilation of ")
        if found: compiled[-1].append(name.split(" in ")[0])
logging.getLogger("jax").addHandler(Watch())
jax.config.update("jax_log_compiles", True)
real = r.Run.after_step
def after_step(self, state, metrics):
    state = real(self, state, metrics)
    compiled.append([])
    (self.workdir / "compiled.json").write_text(json.dumps(compiled))
    return state
r.Run.after_step = after_step
"""
AFTER_TWO_STEPS = """
real = r.Run.after_step
def leave(self, state, metrics):
    state = real(self, state, metrics)
    if self.step == 2: os.kill(os.getpid(), signal.SIGTERM)
    return state
r.Run.after_step = leave
"""
# kill -9 when the third step's responses are scored and nothing is learnt from them yet.
BETWEEN_ROLLOUT_AND_UPDATE = """
real, calls = stage.collect, []
def collect(*arguments, **options):
    collected = real(*arguments, **options)
    calls.append(1)
    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return collected
stage.collect = collect
"""


def module_of(stage):
    return stage.partition("_")[0]


def patched(stage, patch):
    module = module_of(stage)
    return PATCHED.format(module=module, patch=patch, config=CONFIGS[module])
