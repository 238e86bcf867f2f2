"""The speedrun's choice of size, vocabulary, optimizer and batch: bits per byte at equal wall time.

    python -m benchmarks.speedrun_choice --seconds=180 [--only=NAME,NAME]

Each variant first shows its speed in 30 steps, then trains for as many steps as fit; both in fresh
processes, one after the other. The last line is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

_SECONDS = flags.DEFINE_float("seconds", 180.0, "Training time of each variant, compiling aside.")
_ONLY = flags.DEFINE_list("only", [], "Names of the variants to run; default: all.")

_CALIBRATION_STEPS = 30


def depth(layers: int, vocab: int = 4096) -> list[str]:
    width = 64 * layers
    return [
        f"--config.model.{k}={v}"
        for k, v in {
            "num_layers": layers,
            "width": width,
            "num_heads": layers,
            "num_kv_heads": layers,
            "mlp_width": 4 * width,
            "vocab_size": vocab,
        }.items()
    ] + [f"--config.data.tokenizer.vocab_size={vocab}"]


def adamw(rate: float) -> list[str]:
    return ["--config.optimizer.name=adamw", f"--config.optimizer.learning_rate={rate}"]


def batch(sequences: int, length: int) -> list[str]:
    return [
        f"--config.data.batch_sequences={sequences}",
        f"--config.data.length_tokens={length}",
        f"--config.model.max_length_tokens={length}",
    ]


def tables(rate: float) -> list[str]:
    return [f"--config.optimizer.adam_learning_rate={rate}"]


BASE = depth(4) + tables(3e-3)

# Around depth 4, vocabulary 4,096, Muon, 8 sequences of 256, tables at 3e-3; each changes one thing
# but the last two, which are for a longer comparison. The recipe is the one before the last.
VARIANTS = {
    "depth 4": BASE,
    "depth 3": BASE + depth(3),
    "depth 5": BASE + depth(5),
    "vocabulary 2048": BASE + depth(4, 2048),
    "vocabulary 8192": BASE + depth(4, 8192),
    "adamw 3e-3": BASE + adamw(3e-3),
    "batch 4": BASE + batch(4, 256),
    "batch 16": BASE + batch(16, 256),
    "length 512": BASE + batch(4, 512),
    "muon 0.04": [*BASE, "--config.optimizer.learning_rate=0.04"],
    "tables 6e-3": BASE + tables(6e-3),
    "depth 3 + tables 6e-3": depth(3) + tables(6e-3),
    "depth 4 + tables 6e-3": depth(4) + tables(6e-3),
}


def pretrain(workdir: Path, steps: int, overrides: list[str]) -> list[dict]:
    """Train for that many steps, half of them decaying; return the lines of the metrics."""
    command = [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}"]
    command += ["--config=benchmarks/speedrun_pretrain.py", f"--config.total_steps={steps}"]
    command += [f"--config.schedule.decay_steps={steps // 2}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def main(_) -> None:
    results = {}
    for name in _ONLY.value or VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            quick = ["--config.evaluation.every_steps=0", "--config.schedule.warmup_steps=2"]
            lines = pretrain(Path(folder) / "quick", _CALIBRATION_STEPS, [*VARIANTS[name], *quick])
            step_seconds = lines[-1]["perf/step_seconds"]
            steps = round(_SECONDS.value / step_seconds)
            lines = pretrain(Path(folder) / "run", steps, VARIANTS[name])
        results[name] = {
            "steps": steps,
            "tokens_per_second": lines[-2]["perf/tokens_per_second"],
            "bits_per_byte": lines[-1]["eval/all/bits_per_byte"],
        }
        print(name, results[name], file=sys.stderr)
    print(json.dumps({"seconds": _SECONDS.value, "variants": results}))


if __name__ == "__main__":
    app.run(main)
