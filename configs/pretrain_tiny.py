"""The recipe that newcomers and tests run: film reviews, 0.7M parameters, under a minute.

python -m experiments.pretrain --config=configs/pretrain_tiny.py --workdir=runs/tiny
"""

from configs.dataclass_config import to_config_dict
from configs.schema import PretrainConfig
from llm.data.config import SourceConfig
from llm.models.presets import from_depth


def get_config(arg=None):
    config = to_config_dict(PretrainConfig(total_steps=300))
    config.model = to_config_dict(
        from_depth(2, vocab_size=1024, max_length_tokens=128, head_dim=32)
    )
    config.data.sources = {
        "reviews": to_config_dict(
            SourceConfig(kind="tfds", name="film_reviews", validation_split="validation")
        )
    }
    config.data.tokenizer.vocab_size = 1024
    config.data.length_tokens = 128
    config.data.batch_sequences = 16
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.adam_learning_rate = 3e-3
    config.schedule.name = "warmup_stable_decay"
    config.schedule.warmup_steps = 10
    config.schedule.decay_steps = 150
    config.schedule.final_fraction = 0.0
    config.evaluation.every_steps = 100
    config.evaluation.max_sequences = 64
    config.evaluation.prompts = ("The film is",)
    config.run.save_every_steps = 100
    return config
