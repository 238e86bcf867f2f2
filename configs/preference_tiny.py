"""Direct preference optimisation that newcomers and tests run, on the feedback of `reward_tiny`.

python -m experiments.preference --config=configs/preference_tiny.py --workdir=runs/tiny_dpo
"""

from configs import reward_tiny
from configs.dataclass_config import to_config_dict
from configs.schema import DirectPreferenceConfig


def get_config(arg=None):
    config = to_config_dict(DirectPreferenceConfig(source="runs/tiny_chat", total_epochs=2.0))
    config.comparisons = reward_tiny.get_comparisons()
    config.optimizer.learning_rate = 1e-4
    config.evaluate_every_steps = 50
    config.run.save_every_steps = 100
    return config
