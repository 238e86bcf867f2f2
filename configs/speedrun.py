"""The main job in 25 minutes on 2 CPU cores: a few million parameters on prose, reviews and code,
then taught to write film reviews of the kind that is asked for.

python -m experiments.speedrun --workdir=runs/speedrun
"""

import dataclasses

from configs.dataclass_config import to_config_dict
from configs.schema import (
    DirectPreferenceConfig,
    FinetuneConfig,
    PretrainConfig,
    RewardModelConfig,
    RlhfConfig,
    SpeedrunConfig,
)
from llm.data.config import ComparisonsConfig, SourceConfig
from llm.models.presets import from_depth
from llm.rl.config import RewardConfig


def get_config(arg=None):
    config = to_config_dict(
        SpeedrunConfig(
            prompts=(
                "HAMLET. To be, or not to be",
                "The film is",
                "def read_lines(path):\n",
                "Once upon a time",
            )
        )
    )
    config.pretrain = get_pretrain_config()
    config.finetune = get_finetune_config()
    config.reward = get_reward_config()
    config.preference = get_preference_config()
    config.rlhf = get_rlhf_config()
    config.judge.training = to_config_dict(_reviews("instructions", "judge"))
    config.judge.asked = to_config_dict(_reviews("instructions", "validation"))
    return config


def get_pretrain_config():
    config = to_config_dict(PretrainConfig(total_steps=1500))
    config.model = to_config_dict(from_depth(3, vocab_size=4096, max_length_tokens=256))
    config.data.sources = {
        "prose": builder("english_prose"),
        "reviews": builder("film_reviews"),
        "code": builder("stdlib_code"),
    }
    config.data.tokenizer.vocab_size = 4096
    config.data.length_tokens = 256
    config.data.batch_sequences = 8
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.adam_learning_rate = 6e-3
    config.schedule.name = "warmup_stable_decay"
    config.schedule.warmup_steps = 20
    config.schedule.decay_steps = 750
    config.schedule.final_fraction = 0.0
    config.evaluation.every_steps = 500
    config.evaluation.max_sequences = 128
    config.run.save_every_steps = 250
    return config


def get_finetune_config():
    config = to_config_dict(FinetuneConfig(source="pretrain", total_epochs=5.0))
    # Learnt from all reviews, clear or not, it follows in 60% and not 73% (one seed).
    source = dataclasses.replace(_reviews("clear_instructions"), validation_split="validation")
    config.data.sources = {"instructions": to_config_dict(source)}
    config.data.length_tokens = 256
    config.data.batch_sequences = 8
    config.dropout_rate = 0.1
    _muon(config.optimizer)
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 20
    config.schedule.final_fraction = 0.0
    config.evaluation.every_steps = 100
    config.run.save_every_steps = 100
    return config


def get_reward_config():
    config = to_config_dict(RewardModelConfig(source="sft", total_epochs=2.5))
    config.comparisons = _comparisons()
    # 120 pairs a film; with 6, or from all reviews, it stays at chance for long (one seed).
    config.comparisons.max_responses = 16
    config.comparisons.batch_prompts = 4
    config.dropout_rate = 0.1
    _muon(config.optimizer)
    config.evaluate_every_steps = 100
    config.run.save_every_steps = 100
    return config


def get_preference_config():
    config = to_config_dict(DirectPreferenceConfig(source="sft", total_epochs=2.0))
    config.comparisons = _comparisons()
    config.optimizer.learning_rate = 1e-4
    config.evaluate_every_steps = 50
    config.run.save_every_steps = 100
    return config


def get_rlhf_config():
    rewards = {"reward": RewardConfig(kind="model", path="reward")}
    config = to_config_dict(RlhfConfig(source="sft", rewards=rewards, total_steps=60))
    config.value_source = "reward"
    config.prompts = to_config_dict(_reviews("instructions"))
    config.rollout.prompts = 64
    config.rollout.prompt_tokens = 32
    config.rollout.response_tokens = 64
    config.algorithm.minibatches = 2
    config.algorithm.whiten_advantages = True
    config.algorithm.missing_eos_penalty = 0.3
    # 23 to 27 points for 3 to 4 nats; at 0.2 it was 12 for 0.8 (one seed of each).
    config.kl.coefficient = 0.07
    config.optimizer.learning_rate = 1.5e-4
    config.run.save_every_steps = 25
    config.run.log_every_steps = 1
    return config


def _muon(optimizer):
    """Set Muon's rates: in 4 epochs it followed as well as AdamW did in 8 (one seed of each)."""
    optimizer.name = "muon"
    optimizer.learning_rate = 0.01
    optimizer.adam_learning_rate = 2.5e-3


def _comparisons():
    source = dataclasses.replace(
        _reviews("clear_feedback"), format="feedback", validation_split="validation"
    )
    return to_config_dict(
        ComparisonsConfig(source=source, length_tokens=80, batch_prompts=16, max_responses=4)
    )


def _reviews(config: str, split: str = "train") -> SourceConfig:
    """Return film reviews as instructions or as feedback."""
    return SourceConfig(
        kind="tfds",
        name=f"film_reviews/{config}",
        split=split,
        format="prompt_response",
        validation_fraction=0.0,
    )


def builder(name: str):
    """Return one of the packaged corpora as a source."""
    return to_config_dict(SourceConfig(kind="tfds", name=name, validation_split="validation"))
