"""The main job with more time: a GPU's minutes, or about 3 hours on 2 CPU cores.

    python -m experiments.speedrun --config=configs/speedrun_long.py --workdir=runs/speedrun_long

The speedrun's corpora, read four times by a larger model.
"""

from configs import speedrun
from configs.dataclass_config import to_config_dict
from llm.models.presets import from_depth


def get_config(arg=None):
    config = speedrun.get_config()
    pretrain = config.pretrain
    pretrain.model = to_config_dict(from_depth(5, vocab_size=4096, max_length_tokens=256))
    pretrain.model.dropout_rate = 0.1  # four epochs: the text is short
    pretrain.data.batch_sequences = 16
    pretrain.total_steps = 5000
    pretrain.schedule.warmup_steps = 50
    pretrain.schedule.decay_steps = 2500
    pretrain.evaluation.every_steps = 1000
    pretrain.run.save_every_steps = 500
    return config
