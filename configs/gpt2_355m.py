"""GPT-2 355M on 10B tokens of FineWeb-Edu; otherwise as configs/gpt2_124m.py.

python -m experiments.pretrain --config=configs/gpt2_355m.py --workdir=gs://BUCKET/gpt2_355m
"""

from configs import gpt2_124m
from configs.dataclass_config import to_config_dict
from llm.models.presets import PRESETS


def get_config(arg=None):
    config = gpt2_124m.get_config()
    config.model = to_config_dict(PRESETS["gpt2-355m"])
    config.optimizer.learning_rate = 3e-4  # Brown et al. 2020, table 2.1, at this size
    config.accumulate_steps = 16
    return config
