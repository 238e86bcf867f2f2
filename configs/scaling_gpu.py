"""Scaling curves of 1.4M to 91M parameters on one data-centre GPU; web text, some 2e18 FLOPs.

    python -m experiments.scaling --config=configs/scaling_gpu.py --workdir=runs/scaling_gpu

Recipe of configs/scaling.py at sizes that a GPU is for; the learning rates of a width train
together. Not run: no GPU was here.
"""

from ml_collections import ConfigDict

from configs.dataclass_config import to_config_dict
from configs.schema import ScalingConfig
from llm.data.config import SourceConfig
from llm.models.config import ComputeConfig
from llm.scaling.config import LadderConfig
from llm.training.config import OptimizerConfig, ScheduleConfig

MUON = OptimizerConfig(
    name="muon", learning_rate=0.02, adam_learning_rate=3e-3, beta1=0.95, weight_decay=0.1
)
_DECAY = ScheduleConfig(name="linear", warmup_steps=50, final_fraction=0.0)


def get_config(arg=None):
    rates = tuple(2.0**-k for k in range(5, 13))
    adamw = OptimizerConfig(learning_rate=2.0**-8, beta2=0.95)
    widths = dict(
        depths=(4, 8, 16), num_layers=4, tokens=(50_000_000,), learning_rates=rates, schedule=_DECAY
    )
    ladders = {
        "isoflop": LadderConfig(
            depths=(2, 3, 4, 5, 6, 8, 10, 12),
            flops=(3e15, 1e16, 3e16, 1e17, 3e17),
            tokens_per_param_between=(3.0, 300.0),
            learning_rates=(0.02,),
            optimizer=MUON,
            schedule=_DECAY,
        ),
        "standard": LadderConfig(optimizer=adamw, **widths),
        "mup": LadderConfig(optimizer=adamw, mup_base_depth=4, **widths),
        "repeated": LadderConfig(
            depths=(6,),
            tokens=(500_000_000,),
            learning_rates=(0.02,),
            unique_tokens=(None, 125_000_000, 31_250_000, 8_000_000),
            optimizer=MUON,
            schedule=_DECAY,
        ),
    }
    config = to_config_dict(ScalingConfig(ladders=ladders))
    config.compute = to_config_dict(ComputeConfig(dtype="bfloat16"))
    web_text(config, length_tokens=1024, batch_sequences=64)
    return config


def web_text(config: ConfigDict, *, length_tokens: int, batch_sequences: int) -> None:
    """Set the data: FineWeb-Edu and Python code, in rows of that length, by our own tokenizer."""
    for name, dataset, weight in (
        ("web", "HuggingFaceFW/fineweb-edu:sample-100BT", 0.8),
        ("code", "codeparrot/codeparrot-clean", 0.2),
    ):
        source = SourceConfig(
            kind="huggingface", name=dataset, weight=weight, validation_fraction=0.001
        )
        config.data.sources[name] = to_config_dict(source)
    config.data.length_tokens = length_tokens
    config.data.batch_sequences = batch_sequences
    config.data.num_workers = 8
    config.num_evaluations = 20
    config.max_evaluation_sequences = 1024
    config.run.save_every_steps = 1000
