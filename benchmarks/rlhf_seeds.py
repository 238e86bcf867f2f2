"""The speedrun's alignment over several seeds: instruction following, KL and distinctness.

    python -m benchmarks.rlhf_seeds --workdir=runs/seeds --seeds=0,1,2 [--pretrained=runs/speedrun]

One base model, pretrained once (or taken from a finished speedrun); everything after it, from
fine-tuning to PPO, is done anew for each seed. Prints each seed as it ends and one JSON object with
mean and spread (the sample standard deviation) at the end. Goes on where it stopped.
"""

import dataclasses
import json
import shutil
import statistics
import sys
from typing import Any

from absl import flags
from etils import epath

from configs.schema import SpeedrunConfig
from experiments import entry
from experiments.speedrun_alignment import POLICIES, align
from experiments.stages import Stages
from experiments.workdir_flag import WORKDIR

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run for each.")
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "A speedrun's workdir, whose base model is taken.", required=True
)


def seeded(config: SpeedrunConfig, seed: int) -> SpeedrunConfig:
    """Return the recipe with every seed after pretraining set: of data, dropout and sampling."""
    stages = ("finetune", "reward", "preference", "rlhf", "judge")
    return dataclasses.replace(config, **{n: _seeded(getattr(config, n), seed) for n in stages})


def _seeded(config: Any, seed: int) -> Any:
    """Return a config with every field called seed set, in it and in the configs that it holds."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "seed":
            changed["seed"] = seed
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _seeded(value, seed)
    return dataclasses.replace(config, **changed)


def figures(found: dict) -> dict[str, float]:
    """Return what is compared over seeds."""
    flat = {"judge_on_real": found["judge_on_real"]}
    for policy in POLICIES:
        row = found["policies"][policy]
        for name in ("instruction_following", "distinct_2", "response_tokens", "ended_by_eos"):
            flat[f"{policy}/{name}"] = row[name]
    if found["curve"]:
        flat["ppo/kl_nats"] = statistics.mean(row["kl"] for row in found["curve"][-10:])
    return flat


def main(config: SpeedrunConfig) -> None:
    base = epath.Path(_PRETRAINED.value) / "pretrain"
    if not (base / "config.json").exists():
        raise FileNotFoundError(f"--pretrained={_PRETRAINED.value} has no finished pretrain stage")
    runs = {}
    for seed in map(int, _SEEDS.value):
        workdir = epath.Path(WORKDIR.value) / f"seed_{seed}"
        if not (workdir / "pretrain").exists():
            workdir.mkdir(parents=True, exist_ok=True)
            shutil.copytree(base, workdir / "pretrain")
        runs[seed] = figures(align(seeded(config, seed), workdir, Stages(workdir)))
        print(f"seed {seed}: {json.dumps(runs[seed])}", file=sys.stderr)
    names = next(iter(runs.values()))
    summary = {
        name: {
            "mean": statistics.mean(run[name] for run in runs.values()),
            "spread": statistics.stdev(run[name] for run in runs.values()) if len(runs) > 1 else 0,
        }
        for name in names
    }
    print(json.dumps({"seeds": runs, "summary": summary}))


if __name__ == "__main__":
    entry.run(main, SpeedrunConfig, default_config="configs/speedrun.py")
