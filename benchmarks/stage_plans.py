"""Every recipe of the stages after pretraining planned on a slice that suits it.

    python -m benchmarks.stage_plans [--only=rlhf]

Prints the table of benchmarks/RESULTS.md. Rows are compiled (extra [tpu]), minutes a row for large
models, and kept in benchmarks/stage_plans.jsonl; a row that is there is not made again.
"""

import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX 0.10 writes what is compiled ahead into its cache, and cannot read it back without a TPU.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

from absl import app, flags
from etils import epath

from configs.command_line import load_config, split_overrides
from configs.schema import DirectPreferenceConfig, FinetuneConfig, RewardModelConfig, RlhfConfig
from experiments import entry
from experiments.plan_stage_report import report_on_stage
from llm.scaling.hardware import parse_slice

_RESULTS = flags.DEFINE_string(
    "results", "benchmarks/stage_plans.jsonl", "Where rows are kept, one a line."
)
_ONLY = flags.DEFINE_string("only", "", "Only rows whose recipe contains this.")

_TYPES = FinetuneConfig, RewardModelConfig, DirectPreferenceConfig, RlhfConfig
_BF16 = "compute.dtype=bfloat16 compute.unroll_layers=false"
_LARGE = f"mesh.data=1 mesh.fsdp=-1 {_BF16} compute.remat=full"
_RESPONSES = "rollout.prompts=256 rollout.prompt_tokens=512 rollout.response_tokens=512"
_COMPARED = (
    "comparisons.length_tokens=2048 comparisons.batch_prompts=64 comparisons.max_responses=2"
)

# recipe, slice, what has the model's shape, overrides
ROWS = (
    ("configs/finetune_tiny.py", "v5e:1x1", "configs/pretrain_tiny.py", ""),
    ("configs/finetune_domain.py", "v5e:1x1", "configs/pretrain_tiny.py", ""),
    ("configs/finetune_smollm2.py", "v5e:2x2", "smollm2", ""),
    ("configs/reward_tiny.py", "v5e:1x1", "configs/pretrain_tiny.py", ""),
    ("configs/reward_smollm2.py", "v5e:2x2", "smollm2", ""),
    ("configs/preference_tiny.py", "v5e:1x1", "configs/pretrain_tiny.py", ""),
    ("configs/rlhf_tiny.py", "v5e:1x1", "configs/pretrain_tiny.py", ""),
    ("configs/rlhf_smollm2.py", "v5e:2x2", "smollm2", ""),
    ("configs/finetune_tiny.py", "v5p:4x4x4", "configs/llama3_8b.py",
     f"{_LARGE} data.length_tokens=4096 data.batch_sequences=128"),
    ("configs/finetune_smollm2.py", "v5e:4x4", "configs/llama3_8b.py",
     f"{_LARGE} data.length_tokens=4096"),
    ("configs/reward_tiny.py", "v5p:4x4x4", "configs/llama3_8b.py", f"{_LARGE} {_COMPARED}"),
    ("configs/preference_tiny.py", "v5p:4x4x4", "configs/llama3_8b.py", f"{_LARGE} {_COMPARED}"),
    ("configs/rlhf_tiny.py", "v5p:4x4x4", "configs/llama3_8b.py",
     f"{_LARGE} {_RESPONSES} algorithm.minibatches=4"),
    ("configs/rlhf_smollm2.py", "v5e:8x8", "configs/llama3_8b.py",
     f"mesh.data=1 mesh.fsdp=8 mesh.tensor=8 {_BF16} compute.remat=full "
     "rollout.prompt_tokens=512 rollout.response_tokens=512"),
)  # fmt: skip


def main(_):
    file = epath.Path(_RESULTS.value)
    kept = read_rows(file)
    rows = []
    for key in ROWS:
        if _ONLY.value not in " ".join(key):
            continue
        if key not in kept:
            kept[key] = make_row(*key)
            if not kept[key]["fits"]:
                raise ValueError(f"{' '.join(key)} does not fit: {kept[key]['programs']}")
            with file.open("a") as lines:
                lines.write(json.dumps(entry.plain(kept[key])) + "\n")
        rows.append(kept[key])
        print(*key, flush=True)
    print(stage_table(rows))


def read_rows(file: epath.Path) -> dict[tuple[str, ...], dict]:
    """Return the rows that are kept, by recipe, slice, model and overrides."""
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    return {tuple(row[name] for name in ("recipe", "slice", "model", "overrides")): row
            for row in lines}  # fmt: skip


def make_row(recipe: str, slice_name: str, model: str, overrides: str) -> dict:
    """Return a row, compiled now."""
    config_flags = [f"--config.{each}" for each in overrides.split()]
    config = load_config(recipe, split_overrides(config_flags)[1], _TYPES)
    report = report_on_stage(config, parse_slice(slice_name), model)
    facts = {"recipe": recipe, "slice": slice_name, "model": model, "overrides": overrides}
    return facts | report


def stage_table(rows: list[dict]) -> str:
    """Return the table in Markdown, a line a program."""
    lines = [
        "| recipe | model | slice | mesh | program | GB a chip at height | beside | limit | "
        "FLOPs | compute, s | memory, s | network, s | bound by | compiled in |",
        "|---|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for row in rows:
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "1"
        for program in row["programs"]:
            seconds = program["seconds"]
            compiled = "height_gb" in program
            cells = (
                row["recipe"].removeprefix("configs/").removesuffix(".py"),
                f"{row['params']:,}",
                row["slice"],
                mesh,
                program["program"],
                f"{program['height_gb']:.2f}" if compiled else "",
                f"{program['beside_gb']:.2f}",
                f"{row['memory_gb']['limit']:.1f}",
                f"{program['flops']:.3g}",
                *(f"{seconds[name]:.3g}" for name in ("compute", "memory", "network")),
                program["bound_by"],
                f"{program['compile_seconds']:.0f} s" if compiled else "",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
