"""Kill -9 at random times, over all stages: does every run end bitwise where the unbroken one does?

    python -m benchmarks.faults --kills=15 [--stages=pretrain,rlhf] [--seed=0]

The real entry points on a tiny model's whole life, saving every second step. Compared are, bit for
bit, the digest of every saved step's whole state, the place in the data, every line of metrics but
for speeds, every sample and table. The last line is one JSON object.
"""

import json
import os
import pathlib
import random
import tempfile
import time

from absl import app, flags

_KILLS = flags.DEFINE_integer("kills", 15, "Kills of each stage, at most.")
_STAGES = flags.DEFINE_list("stages", [], "Stages; default: all.")
_STEPS = flags.DEFINE_integer("steps", 40, "Steps of a stage.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the times of the kills.")


def main(_):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests.faults.harness import SAVE_EVERY_STEPS, STAGES, make_life, outcome, run_with_kills

    chance, report = random.Random(_SEED.value), {}
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        folder = pathlib.Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{name}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        steps = f"--config.total_steps={_STEPS.value}"
        own = {stage: () if stage == "scaling" else (steps,) for stage in STAGES}
        make_life(folder, own)
        for stage in _STAGES.value or STAGES:
            began, workdir = time.monotonic(), folder / f"{stage}_killed"
            kills = run_with_kills(stage, folder, workdir, chance, _KILLS.value, *own[stage])
            ours, unbroken = outcome(workdir), outcome(folder / stage)
            differing = sorted(x for x in ours | unbroken if ours.get(x) != unbroken.get(x))
            report[stage] = {
                "kills": len(kills),
                "differing": differing,
                "most_steps_redone": max(
                    (k.logged_step - k.committed_step for k in kills), default=0
                ),
                "seconds": round(time.monotonic() - began, 1),
            }
            verdict = "bitwise the unbroken run" if not differing else f"DIFFERS: {differing}"
            most, seconds = report[stage]["most_steps_redone"], report[stage]["seconds"]
            print(
                f"{stage:14} {len(kills):3} kills in {seconds:.0f} s, at most {most} steps redone: "
                f"{verdict}",
                flush=True,
            )
    print(json.dumps({"save_every_steps": SAVE_EVERY_STEPS, "stages": report}))


if __name__ == "__main__":
    app.run(main)
