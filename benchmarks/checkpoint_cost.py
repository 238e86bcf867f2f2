"""What saving costs a run: the same steps with checkpoints and without, in turns.

    python -m benchmarks.checkpoint_cost [--config=configs/pretrain_tiny.py]
        [--steps=240] [--every=60] [--rounds=3]

Each round trains twice in this process, in fresh workdirs. Compared are the seconds of the loop
from the second step on: saving in the background also slows the steps that follow it. The last
line is one JSON object; `cost_seconds` is of one save, `share` what it is of an interval of
--interval_seconds.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

from absl import app, flags, logging

_CONFIG = flags.DEFINE_string("config", "configs/pretrain_tiny.py", "The recipe.")
_STEPS = flags.DEFINE_integer("steps", 240, "Steps of a run.")
_EVERY = flags.DEFINE_integer("every", 60, "Steps between two saves, where there are saves.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Pairs of runs.")
_INTERVAL = flags.DEFINE_float("interval_seconds", 600.0, "A realistic time between two saves.")


def main(_):
    from configs.command_line import load_config
    from configs.schema import PretrainConfig
    from experiments import entry
    from experiments.pretrain import pretrain
    from llm.training.goodput import read_goodput
    from llm.training.manifests import CHECKPOINTS, list_steps
    from llm.training.metrics import read_metrics
    from llm.training.run import Run

    logging.set_verbosity(logging.WARNING)  # as every entry point does: Orbax says a lot
    entry.tune_for_cpu()
    config = load_config(_CONFIG.value, [], PretrainConfig)
    evaluation = dataclasses.replace(config.evaluation, every_steps=0, at_start=False)
    config = dataclasses.replace(
        config, total_steps=_STEPS.value, total_tokens=None, evaluation=evaluation
    )
    times: list[float] = []
    real = Run.after_step

    def after_step(self, state, metrics):
        state = real(self, state, metrics)
        times.append(time.perf_counter())
        return state

    Run.after_step = after_step
    seconds = {"saving": [], "not": []}
    with tempfile.TemporaryDirectory(prefix="checkpoint_cost_") as folder:
        for i in range(_ROUNDS.value):
            for kind, every in (("saving", _EVERY.value), ("not", 0)):
                run_config = dataclasses.replace(config.run, save_every_steps=every)
                workdir = pathlib.Path(folder) / f"{kind}-{i}"
                times.clear()
                pretrain(dataclasses.replace(config, run=run_config), str(workdir))
                # Without the last step, which both save, and the first, which compiles.
                seconds[kind].append(times[-2] - times[1])
                last = read_metrics(workdir)[-1]["step"]
                print(f"{kind}: {seconds[kind][-1]:.2f} s, {last} steps; "
                      f"{read_goodput(workdir).describe()}", flush=True)  # fmt: skip
        saves = len([s for s in range(_EVERY.value, _STEPS.value - 1) if s % _EVERY.value == 0])
        step = workdir / CHECKPOINTS / str(list_steps(workdir)[-1])
        size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    pairs = zip(seconds["saving"], seconds["not"], strict=True)
    costs = [(with_saves - without) / saves for with_saves, without in pairs]
    report = {
        "config": _CONFIG.value,
        "steps": _STEPS.value,
        "saves": saves,
        "checkpoint_bytes": size,
        "seconds": seconds,
        "cost_seconds": statistics.median(costs),
        "share": statistics.median(costs) / _INTERVAL.value,
        "interval_seconds": _INTERVAL.value,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
