"""Random learning rates and weight decays of a 124M model, each on a spot v5e-8 by SkyPilot.

python -m experiments.sweep --config=configs/sweep_tpu.py --workdir=gs://BUCKET/sweep [--dry_run]

Of 16 members the best 4 go past step 2,000 and the best one past step 6,000. SkyPilot's own schema
accepts the tasks; not run.
"""

from configs.dataclass_config import to_config_dict
from configs.schema import SweepConfig
from configs.sweep_space import log_uniform, random
from llm.launch.config import HalvingConfig


def get_config(arg=None):
    config = to_config_dict(SweepConfig)
    config.recipe = "configs/gpt2_124m.py"
    config.members = random(
        16,
        0,
        {
            "optimizer.learning_rate": log_uniform(1e-4, 4e-3),
            "optimizer.weight_decay": log_uniform(1e-2, 1.0),
        },
    )
    config.metric = "train/loss"
    config.halving = to_config_dict(HalvingConfig(at_steps=(2_000, 6_000), factor=4))
    config.executor = "skypilot"
    config.skypilot.slice = "v5e-8"
    config.skypilot.extras = ("huggingface",)
    return config
