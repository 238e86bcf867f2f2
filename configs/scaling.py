"""Scaling curves on 2 CPU cores: five budgets, learning-rate transfer, repeated text.

python -m experiments.scaling --workdir=runs/scaling [--dry_run]
"""

import dataclasses

from configs.dataclass_config import to_config_dict
from configs.schema import ScalingConfig
from configs.speedrun import builder
from llm.scaling.config import LadderConfig
from llm.training.config import OptimizerConfig, ScheduleConfig

_DECAY = ScheduleConfig(name="linear", warmup_steps=10, final_fraction=0.0)
_SMALL = dict(width_per_layer=16, head_dim=16, schedule=_DECAY)
_MUON = OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=6e-3, weight_decay=0.1)


def get_config(arg=None):
    adamw_rates = tuple(2.0**-k for k in range(2, 8))
    muon_rates = tuple(2.0**-k for k in range(6))
    adamw = OptimizerConfig(learning_rate=2.0**-5, beta2=0.95)
    muon = dataclasses.replace(_MUON, learning_rate=2.0**-4, adam_learning_rate=2.0**-6)
    widths = dict(depths=(2, 4, 8), num_layers=2, tokens=(100_000,), **_SMALL)
    ladders = {
        "isoflop": LadderConfig(
            depths=(1, 2, 3, 4, 5, 6, 7),
            flops=(1.5e11, 3.5e11, 8e11, 1.8e12, 4e12),
            tokens_per_param_between=(0.33, 160.0),
            learning_rates=(0.02,),
            optimizer=_MUON,
            **_SMALL,
        ),
        "adamw-standard": LadderConfig(optimizer=adamw, learning_rates=adamw_rates, **widths),
        "adamw-mup": LadderConfig(
            optimizer=adamw, learning_rates=adamw_rates, mup_base_depth=2, **widths
        ),
        "muon-standard": LadderConfig(optimizer=muon, learning_rates=muon_rates, **widths),
        "muon-mup": LadderConfig(
            optimizer=muon, learning_rates=muon_rates, mup_base_depth=2, **widths
        ),
        "repeated": LadderConfig(
            depths=(2, 3),
            tokens=(1_000_000,),
            learning_rates=(0.02,),
            unique_tokens=(None, 250_000, 125_000, 62_500),
            optimizer=_MUON,
            **_SMALL,
        ),
    }
    config = to_config_dict(ScalingConfig(ladders=ladders))
    for name in ("english_prose", "stdlib_code"):
        config.data.sources[name] = builder(name)
    config.data.tokenizer.vocab_size = 1024
    config.data.length_tokens = 128
    config.data.batch_sequences = 8
    config.num_evaluations = 6
    config.max_evaluation_sequences = 64
    config.run.save_every_steps = 500
    return config
