"""The main job in 15 minutes on 2 CPU cores: a few million parameters on prose, reviews and code.

python -m experiments.speedrun --workdir=runs/speedrun
"""

from configs.dataclass_config import to_config_dict
from configs.schema import PretrainConfig, SpeedrunConfig
from llm.data.config import SourceConfig
from llm.models.presets import from_depth


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
    return config


def get_pretrain_config():
    config = to_config_dict(PretrainConfig(total_steps=2000))
    config.model = to_config_dict(from_depth(3, vocab_size=4096, max_length_tokens=256))
    config.data.sources = {
        "prose": _builder("english_prose"),
        "reviews": _builder("film_reviews"),
        "code": _builder("stdlib_code"),
    }
    config.data.tokenizer.vocab_size = 4096
    config.data.length_tokens = 256
    config.data.batch_sequences = 8
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.adam_learning_rate = 6e-3
    config.schedule.name = "warmup_stable_decay"
    config.schedule.warmup_steps = 20
    config.schedule.decay_steps = 1000
    config.schedule.final_fraction = 0.0
    config.evaluation.every_steps = 500
    config.evaluation.max_sequences = 128
    config.run.save_every_steps = 250
    return config


def _builder(name: str):
    return to_config_dict(SourceConfig(kind="tfds", name=name, validation_split="validation"))
