"""Instruction fine-tuning that newcomers and tests run: reviews on demand, from `pretrain_tiny`.

    python -m experiments.finetune --config=configs/finetune_tiny.py --workdir=runs/tiny_chat

`--config.source=…` starts from another model; `--config.adapter.rank=8` learns low-rank factors.
"""

from configs.dataclass_config import to_config_dict
from configs.schema import FinetuneConfig
from llm.data.config import SourceConfig


def get_config(arg=None):
    config = to_config_dict(FinetuneConfig(source="runs/tiny", total_epochs=2.0))
    config.data.sources = {
        "instructions": to_config_dict(
            SourceConfig(
                kind="tfds",
                name="film_reviews/instructions",
                validation_split="validation",
                format="prompt_response",
                group_field="film",
            )
        )
    }
    config.data.length_tokens = 128
    config.data.batch_sequences = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 10
    config.schedule.final_fraction = 0.0
    config.evaluation.every_steps = 100
    config.evaluation.at_start = True
    config.evaluation.max_sequences = 64
    config.evaluation.prompts = (
        "Write a positive review of Frida.",
        "Write a negative review of Frida.",
    )
    config.run.save_every_steps = 100
    return config
