"""Every pretraining recipe planned on a slice that suits it, and compiled for it without one.

    python -m benchmarks.plans [--compile] [--only=llama]

Prints the table of benchmarks/RESULTS.md, its predictions held against the compiler's account, then
weak scaling by prediction. What was compiled is kept in benchmarks/plans.jsonl, since that takes
minutes a row; --compile makes the rows that are not there.
"""

import dataclasses
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX 0.10 writes what is compiled ahead into its cache, and cannot read it back without a TPU.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

from absl import app, flags
from etils import epath

from configs.command_line import load_config, split_overrides
from configs.schema import PretrainConfig, SpeedrunConfig
from experiments import entry
from experiments.plan_report import report_on
from experiments.plan_step import planned
from llm.parallel.config import MeshConfig
from llm.scaling.accounting import num_params
from llm.scaling.hardware import parse_slice

_RESULTS = flags.DEFINE_string(
    "results", "benchmarks/plans.jsonl", "Where compiled rows are kept, one a line."
)
_COMPILE = flags.DEFINE_boolean("compile", False, "Compile rows that are not in the file.")
_ONLY = flags.DEFINE_string("only", "", "Only rows whose recipe contains this.")

# recipe, slice, overrides
ROWS = (
    ("configs/pretrain_tiny.py", "v5e:1x1", ""),
    ("configs/moe_tiny.py", "v5e:1x1", ""),
    ("configs/speedrun.py", "v5e:1x1", ""),
    ("configs/speedrun_long.py", "v5e:1x1", ""),
    ("configs/speedrun_chinese.py", "v5e:1x1", ""),
    ("configs/depth.py:12", "v5e:4x4", ""),
    ("configs/gpt2_124m.py", "v5e:4x4", "compute.unroll_layers=false"),
    ("configs/gpt2_355m.py", "v5e:4x4", "mesh.data=2 mesh.tensor=8 compute.unroll_layers=false"),
    ("configs/depth.py:16", "v5e:4x4",
     "mesh.data=1 mesh.fsdp=-1 accumulate_steps=2 compute.remat=full"),
    ("configs/depth.py:24", "v5e:8x8",
     "mesh.data=1 mesh.fsdp=-1 accumulate_steps=2 compute.remat=attention optimizer.name=adamw"),
    ("configs/llama3_8b.py", "v5p:2x2x4", "accumulate_steps=16 compute.remat=full"),
    ("configs/llama3_8b.py", "v5p:4x4x4", ""),
    ("configs/llama3_8b.py", "v5p:4x4x4",
     "mesh.pipeline=4 accumulate_steps=2 compute.remat=full"),
    ("configs/llama3_8b.py", "v5p:4x4x4",
     "mesh.context=8 data.batch_sequences=64 data.length_tokens=65536 accumulate_steps=2 "
     "model.max_length_tokens=65536 compute.remat=full"),
    ("configs/llama3_8b.py", "v5e:16x16", "accumulate_steps=2 compute.remat=full"),
    ("configs/llama3_8b.py", "v6e:16x16",
     "mesh.tensor=4 mesh.fsdp=64 accumulate_steps=4 compute.remat=attention"),
    ("configs/gpt3_175b.py", "v5p:8x8x8", ""),
    ("configs/mixtral_8x7b.py", "v5p:4x4x4", ""),
    ("configs/qwen3_30b_a3b.py", "v5p:4x4x4", ""),
    ("configs/moe_1t.py", "v5p:16x16x16", ""),
)  # fmt: skip
# Llama-3 8B with eight sequences of 8,192 a chip and step, on more and more chips.
WEAK = ("v5p:2x2x4", "v5p:4x8x8", "v5p:16x16x16", "v5e:4x4", "v5e:16x16", "16*v5e:16x16")


def main(_):
    file = epath.Path(_RESULTS.value)
    kept = read_compiled(file)
    rows = []
    for key in ROWS:
        if _ONLY.value not in " ".join(key):
            continue
        row = make_row(*key, kept.get(key), compile_it=_COMPILE.value and key not in kept)
        if key not in kept and "compiled" in row:
            line = dict(zip(("recipe", "slice", "overrides"), key, strict=True))
            with file.open("a") as lines:
                lines.write(json.dumps(entry.plain(line | {"compiled": row["compiled"]})) + "\n")
        rows.append(row)
        print(row["recipe"], row["slice"], row["overrides"], row.get("compiler", ""), flush=True)
    print(plans_table(rows))
    print()
    print(compiled_table([row for row in rows if "compiled" in row]))
    print()
    print(weak_scaling_table())


def read_compiled(file: epath.Path) -> dict[tuple[str, str, str], dict]:
    """Return what the compiler said of rows, by recipe, slice and overrides."""
    lines = file.read_text().splitlines() if file.exists() else ()
    return {
        (row["recipe"], row["slice"], row["overrides"]): row["compiled"]
        for row in map(json.loads, lines)
    }


def recipe_config(recipe: str, overrides: str) -> PretrainConfig:
    """Return the pretraining config of a recipe, a speedrun's own part of it."""
    flags_of = [f"--config.{each}" for each in overrides.split()]
    config = load_config(recipe, split_overrides(flags_of)[1], (PretrainConfig, SpeedrunConfig))
    return config.pretrain if isinstance(config, SpeedrunConfig) else config


def make_row(
    recipe: str, slice_name: str, overrides: str, kept: dict | None = None, *, compile_it: bool
) -> dict:
    """Return a row: the plan made now, the compiler's account kept from before, or made now."""
    config = recipe_config(recipe, overrides)
    report = report_on(config, parse_slice(slice_name), compile_it=compile_it)
    if kept is not None:
        report |= {"compiled": kept, "fits": True}
    facts = {"recipe": recipe, "overrides": overrides, "params": num_params(config.model)}
    return facts | report


def plans_table(rows: list[dict]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| recipe | slice | mesh | micro | remat | parameters | GB a chip: predicted | compiled | "
        "off | step, s | bound by | MFU at most | predicted | days |",
        "|---|---|---|--:|---|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "1"
        total, said = row["memory_gb"]["total"], row.get("compiled", {}).get("memory_gb", {})
        off = f"{total / said['total'] - 1:+.1%}" if said else ""
        cells = (
            row["recipe"].removeprefix("configs/").replace(".py", ""),
            row["slice"],
            mesh,
            row["accumulate_steps"],
            row["remat"],
            f"{row['params']:,}",
            f"{total:.2f}" + ("" if row["fits"] else " (too large)"),
            f"{said['total']:.2f}" if said else "",
            off,
            f"{row['seconds']['predicted']:.3f}",
            row["bound_by"],
            f"{row['mfu_bound']:.0%}",
            f"{row['mfu_predicted']:.0%}",
            f"{row['days']:.2f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def compiled_table(rows: list[dict]) -> str:
    """Return what the compiled steps do beside what was predicted of them."""
    lines = [
        "| recipe | slice | products outside of kernels, compiled to predicted | "
        "GB a chip sends a step: predicted | "
        "compiled | attention kernels a step | compiled in |",
        "|---|---|--:|---|---|---|--:|",
    ]
    for row in rows:
        said = row["compiled"]
        sent = (
            " ".join(f"{axis} {value:.2f}" for axis, value in each.items() if value > 0.005)
            for each in (row["network_gb"], said["network_gb"])
        )
        kernels = {part: 0 for part in ("fwd", "dq", "dkv")}
        for name, count in said["kernels"].items():
            for part in kernels:
                kernels[part] += count * (f"mha_{part}" in name)
        cells = (
            row["recipe"].removeprefix("configs/").replace(".py", ""),
            row["slice"],
            f"{said['product_flops'] / row['flops_a_step']['outside_of_kernels']:.4f}",
            *sent,
            ", ".join(f"{count} {part}" for part, count in kernels.items()),
            f"{said['compile_seconds']:.0f} s",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weak_scaling_table() -> str:
    """Return predictions of one model on more and more chips, the batch growing with them."""
    lines = [
        "| slice | chips | mesh | sequences a step | step, s | waited for | MFU predicted | "
        "tokens a day |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for name in WEAK:
        where = parse_slice(name)
        base = recipe_config("configs/llama3_8b.py", "compute.remat=full accumulate_steps=8")
        fsdp = min(where.slice_chips, 256)
        config = dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, batch_sequences=8 * where.num_chips),
            mesh=MeshConfig(data=where.num_chips // fsdp, fsdp=fsdp),
        )
        plan = planned(config, where)
        cells = (
            name,
            f"{where.num_chips:,}",
            f"data {where.num_chips // fsdp} fsdp {fsdp}",
            f"{8 * where.num_chips:,}",
            f"{plan.time.predicted:.3f}",
            f"{plan.time.predicted - plan.time.bound:.3f}",
            f"{plan.mfu:.1%}",
            f"{plan.tokens_per_day:.2e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
