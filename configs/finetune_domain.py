"""Continued pretraining: from general text to an industry's, without forgetting the old.

    python -m experiments.finetune --config=configs/finetune_domain.py --workdir=runs/domain

From the model of `pretrain_tiny`, which read film reviews, on to Python code; a quarter of what it
reads is old text again. Its bits per byte on both are measured before the first step and after:
what it forgets is their difference. `--config.data.sources.old.weight=0` shows it without replay.
The task comes next: `finetune_tiny` with `--config.source=runs/domain`.
"""

from configs.dataclass_config import to_config_dict
from configs.schema import FinetuneConfig
from llm.data.config import SourceConfig


def get_config(arg=None):
    config = to_config_dict(FinetuneConfig(source="runs/tiny", total_steps=300))
    config.data.sources = {
        "new": _corpus("stdlib_code", weight=0.75),
        "old": _corpus("film_reviews", weight=0.25),
    }
    config.data.length_tokens = 128
    config.data.batch_sequences = 16
    config.optimizer.learning_rate = 1e-3
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 10
    config.schedule.final_fraction = 0.0
    config.evaluation.every_steps = 100
    config.evaluation.at_start = True
    config.evaluation.max_sequences = 64
    config.run.save_every_steps = 100
    return config


def _corpus(name: str, weight: float):
    return to_config_dict(
        SourceConfig(kind="tfds", name=name, validation_split="validation", weight=weight)
    )
