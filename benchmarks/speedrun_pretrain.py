"""The speedrun's pretraining, evaluated once, at its end, on all held-out text."""

from configs.speedrun import get_pretrain_config


def get_config(arg=None):
    config = get_pretrain_config()
    config.evaluation.every_steps = 1_000_000  # and so at the end only
    config.evaluation.max_sequences = None
    config.run.save_every_steps = 0
    return config
