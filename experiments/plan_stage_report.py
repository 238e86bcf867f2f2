"""What `experiments.plan` prints of a stage after pretraining: each of its programs, and a step."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.plan_report import GB, network_seconds
from experiments.plan_shapes import Stage, StageProgram
from experiments.plan_stages import StageConfig, model_shape, stage_of
from experiments.plan_step import Compiled, DoesNotFit, compile_step
from llm.evaluation.tables import format_duration
from llm.parallel.collectives import bytes_by_axes
from llm.scaling.hardware import Slice
from llm.scaling.workload import mesh_sizes
from llm.training.ahead import topology_devices


def report_on_stage(config: StageConfig, where: Slice, model: str = "") -> dict:
    """Return the plan of a stage as numbers, its programs compiled; `model` has its model's shape,
    by default the config's source.

    A program takes at least what its products, the least it reads and writes, or what it sends
    takes at published rates; a step takes them one after the other. Of a step that does not fit no
    times are told.

    Raises:
      FileNotFoundError: nothing has the model's shape.
      ValueError: the stage cannot run on the slice with the config's mesh.
    """
    try:
        shape = model_shape(model or config.source)
    except FileNotFoundError as error:
        if model:
            raise
        raise FileNotFoundError(
            f"config.source: {error}; of a model that is still to be made, --model=configs/….py "
            "names the recipe with its shape"
        ) from error
    stage = stage_of(config, shape, topology_devices(where.topology, where.num_slices))
    programs = [_describe(program, stage, config, where) for program in stage.programs]
    fits = all(program["fits"] for program in programs)
    seconds = sum(program["seconds"]["bound"] for program in programs) if fits else None
    days = stage.num_steps * seconds / 86400 if fits and stage.num_steps is not None else None
    price = config.run.chip_hour_dollars.get(where.chip_name)
    sizes = mesh_sizes(config.mesh, where.num_chips)
    return {
        "slice": where.name,
        "chips": where.num_chips,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "params": stage.params,
        "fits": fits,
        "memory_gb": {"limit": where.chip.memory_bytes / GB}
        | {name: value / GB for name, value in stage.resident.items()},
        "programs": programs,
        "seconds": seconds,
        "tokens_a_day": stage.tokens / seconds * 86400 if fits else None,
        "days": days,
        "dollars": None if days is None or price is None else days * 24 * where.num_chips * price,
        "notes": stage.notes,
    }


def _describe(program: StageProgram, stage: Stage, config: StageConfig, where: Slice) -> dict:
    row: dict[str, Any] = {"program": program.name, "beside_gb": program.beside / GB}
    peak, limit = where.num_chips * where.chip.peak_flops, where.chip.memory_bytes
    if program.lower is None:
        compute = program.products / peak
        of_time = {"compute": compute, "memory": 0.0, "network": 0.0, "bound": compute}
        return row | {"fits": program.beside <= limit, "flops": program.products} | {
            "seconds": of_time, "bound_by": "compute"
        }  # fmt: skip
    try:
        found = compile_step(program.lower(), stage.mesh, program.open_turns)
    except DoesNotFit as error:
        return row | {"fits": False, "compiler": str(error), "seconds": None}
    return row | _measured(program, found, config, where)


def _measured(
    program: StageProgram, found: Compiled, config: StageConfig, where: Slice
) -> dict[str, Any]:
    """Return the compiler's account of a program and the least time that it takes."""
    chips, chip = where.num_chips, where.chip
    flops = found.product_flops * chips + program.kernels
    sent = bytes_by_axes(found.collectives)
    network = network_seconds(sent, where, config.mesh)
    seconds = {
        "compute": flops / chips / chip.peak_flops,
        "memory": program.moved / chip.memory_bytes_per_second,
        "network": max(network.values(), default=0.0),
    }
    bound_by = max(seconds, key=seconds.__getitem__)
    if bound_by == "network":
        bound_by = f"network ({max(network, key=network.__getitem__)})"
    return {
        "fits": found.memory.height + program.beside <= chip.memory_bytes,
        "height_gb": found.memory.height / GB,
        "state_gb": found.memory.state / GB,
        "temporary_gb": found.memory.temporaries / GB,
        "flops": flops,
        "network_gb": {"+".join(axes): value / GB for axes, value in sent.items()},
        "network_seconds": network,
        "seconds": seconds | {"bound": max(seconds.values())},
        "bound_by": bound_by,
        "kernels": found.kernels,
        "compile_seconds": found.seconds,
    }


# --------------------------------------------------------------------------------- text

_COLUMNS = "{:18} {:>9} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10}  {}"


def stage_text(report: Mapping[str, Any]) -> str:
    """Return a stage's plan as lines of text."""
    memory = report["memory_gb"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "one device"
    held = ", ".join(f"{name} {gb:.2f}" for name, gb in memory.items() if name != "limit")
    lines = [
        f"{report['slice']}: {report['chips']} chip(s), {mesh}, {report['params']:,} parameters",
        "",
        f"memory a chip, GB      {memory['limit']:.2f}: "
        + ("fits" if report["fits"] else "DOES NOT FIT"),
        f"  from step to step    {held}",
        _COLUMNS.format(
            "program", "at height", "beside", "FLOPs", "compute, s", "memory, s", "network, s",
            "at least", "bound by",
        ),
    ]  # fmt: skip
    lines += [_program_line(row) for row in report["programs"]]
    lines += report["notes"]
    if not report["fits"]:
        return "\n".join(lines)
    days, dollars = report["days"], report["dollars"]
    whole = "total_steps is not set: passes over the data are counted when it is there"
    if days is not None:
        whole = f"at least {format_duration(math.ceil(days * 86400))}"
        whole += (
            "; its price needs run.chip_hour_dollars"
            if dollars is None
            else f", {dollars:,.0f} dollars"
        )
    lines += [
        f"seconds a step         at least {report['seconds']:.3g}"
        + (
            ", of full length" if any(r["program"] == "rollout" for r in report["programs"]) else ""
        ),
        f"tokens a day           at most {report['tokens_a_day']:.3e}",
        f"the whole run          {whole}",
    ]
    return "\n".join(lines)


def _program_line(row: Mapping[str, Any]) -> str:
    if "compiler" in row:
        return f"{row['program']:18} too large: {row['compiler']}"
    height, seconds = row.get("height_gb"), row["seconds"]
    bound_by = row["bound_by"] if row["fits"] else "TOO LARGE"
    return _COLUMNS.format(
        row["program"],
        "" if height is None else f"{height:.2f}",
        f"{row['beside_gb']:.2f}",
        f"{row['flops']:.3e}",
        *(f"{seconds[name]:.3g}" for name in ("compute", "memory", "network", "bound")),
        bound_by,
    )
