"""One run of any pretraining recipe on a spot slice of Cloud TPU, by SkyPilot: a sweep of one.

    python -m experiments.sweep --config=configs/launch.py:configs/depth.py:24 \
        --config.skypilot.slice=v5p-128 --config.shared="({'accumulate_steps': 1},)" \
        --workdir=gs://BUCKET/d24 [--dry_run]

SkyPilot's own schema accepts the tasks; not run.
"""

from configs.dataclass_config import to_config_dict
from configs.schema import SweepConfig
from configs.sweep_space import listed


def get_config(arg="configs/gpt2_124m.py"):
    config = to_config_dict(SweepConfig)
    config.recipe = arg
    config.members = listed({})
    config.executor = "skypilot"
    config.skypilot.extras = ("huggingface",)
    return config
