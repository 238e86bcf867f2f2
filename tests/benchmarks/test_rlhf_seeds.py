"""Runs that are compared over seeds differ in every seed after pretraining, and in nothing else."""

import dataclasses

from benchmarks.rlhf_seeds import seeded
from configs import speedrun
from configs.dataclass_config import from_config_dict
from configs.schema import SpeedrunConfig


def leaves(config, prefix=""):
    """Every field of nested dataclasses and dicts by its path."""
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not isinstance(config, dict):
        return {prefix: config}
    found = {}
    for name, value in config.items():
        found |= leaves(value, f"{prefix}.{name}")
    return found


def test_every_seed_after_pretraining_is_set():
    config = from_config_dict(speedrun.get_config(), SpeedrunConfig)
    before, after = leaves(config), leaves(seeded(config, 7))
    changed = {path for path in before if before[path] != after[path]}
    seeds = {path for path in before if path.endswith("seed") and ".pretrain" not in path}
    assert changed == seeds
    assert {".reward.comparisons.seed", ".preference.comparisons.seed", ".judge.seed"} <= seeds
    assert all(after[path] == 7 for path in seeds)
