"""Learning rates and warm-ups of the newcomer's recipe: eight members, minutes on two CPU cores.

python -m experiments.sweep --config=configs/sweep_tiny.py --workdir=runs/sweep [--dry_run]
"""

from configs.dataclass_config import to_config_dict
from configs.schema import SweepConfig
from configs.sweep_space import grid, listed


def get_config(arg=None):
    config = to_config_dict(SweepConfig)
    config.recipe = "configs/pretrain_tiny.py"
    config.members = grid(
        {"optimizer.learning_rate": [0.02, 0.04, 0.08, 0.16], "schedule.warmup_steps": [10, 40]}
    )
    config.shared = listed(
        {"total_steps": 200, "schedule.decay_steps": 100, "evaluation.every_steps": 50}
    )
    config.metric = "eval/reviews/loss"
    config.local.parallel = 2
    return config
