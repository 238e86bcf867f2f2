"""What `experiments.plan` prints: one dict of plain numbers a plan, and its text."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from configs.schema import PretrainConfig
from experiments.plan_step import DoesNotFit, compiled, planned
from llm.evaluation.tables import format_duration
from llm.parallel.collectives import Collective, bytes_by_axes
from llm.parallel.config import MESH_AXES, MeshConfig
from llm.scaling.hardware import Slice, Wiring, wire_axes
from llm.scaling.plan import Plan
from llm.scaling.step_memory import StepMemory
from llm.scaling.workload import mesh_sizes

GB = 1e9


def report_on(config: PretrainConfig, where: Slice, *, compile_it: bool) -> dict:
    """Return the plan of a run as numbers; where the slice is of TPUs and asked for, with what the
    compiler says."""
    found, refused = None, None
    if compile_it and where.topology:
        try:
            found = compiled(config, where)
        except DoesNotFit as error:
            refused = str(error)
    return _describe(config, where, planned(config, where), found, refused)


def _describe(
    config: PretrainConfig, where: Slice, plan: Plan, found: Any, refused: str | None
) -> dict:
    sizes = mesh_sizes(config.mesh, where.num_chips)
    report = {
        "slice": where.name,
        "chips": where.num_chips,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "accumulate_steps": config.accumulate_steps,
        "remat": config.compute.remat,
        "fits": found is not None or (plan.fits and refused is None),  # the compiler knows
        "memory_gb": {"limit": plan.memory_bytes / GB, "total": plan.memory.total / GB}
        | {name: value / GB for name, value in dataclasses.asdict(plan.memory).items()},
        "flops_a_step": dataclasses.asdict(plan.work)
        | {
            "executed": plan.work.executed,
            "outside_of_kernels": plan.work.outside_of_kernels,
        },
        "network_gb": {axis: value / GB for axis, value in plan.sent_bytes.items()},
        "seconds": dataclasses.asdict(plan.time)
        | {"bound": plan.time.bound, "predicted": plan.time.predicted},
        "bound_by": plan.time.bound_by,
        "mfu_bound": plan.mfu_bound,
        "mfu_predicted": plan.mfu,
        **_cost(config, where, plan),
    }
    if refused is not None:
        report["compiler"] = refused
    if found is not None:
        report["compiled"] = _describe_compiled(config, where, plan, found)
    return report


def _cost(config: PretrainConfig, where: Slice, plan: Plan) -> dict:
    days = config.num_steps * plan.time.predicted / 86400
    price = config.run.chip_hour_dollars.get(where.chip_name)
    return {
        "tokens_a_day": plan.tokens_per_day,
        "days": days,
        "dollars": None if price is None else days * 24 * where.num_chips * price,
    }


def _describe_compiled(config: PretrainConfig, where: Slice, plan: Plan, found: Any) -> dict:
    """Return the compiler's account: what is not state or gradients is activations and scratch."""
    memory = plan.memory
    gradients = memory.gradients + memory.gradient_sum
    known = memory.params + memory.optimizer + gradients
    products = found.product_flops * where.num_chips
    sent = bytes_by_axes(found.collectives)
    network = network_seconds(sent, where, config.mesh)
    compute = (products + plan.work.attention) / plan.peak_flops
    bound = max(compute, plan.time.memory, max(network.values(), default=0.0)) + plan.time.update
    return {
        "memory_gb": {
            "total": found.memory.height / GB,
            "parameters": memory.params / GB,
            "optimizer": memory.optimizer / GB,
            "gradients": gradients / GB,
            "activations": (found.memory.height - known) / GB,
        },
        "product_flops": products,
        "network_gb": {"+".join(axes): value / GB for axes, value in sent.items()},
        "network_seconds": network,
        "collectives": _largest(found.collectives),
        "kernels": found.kernels,
        "mfu_bound": plan.work.model / bound / plan.peak_flops,
        "seconds_bound": bound,
        "compile_seconds": found.seconds,
    }


def network_seconds(
    sent: Mapping[tuple[str, ...], float], where: Slice, mesh: MeshConfig
) -> dict[str, float]:
    """Return the seconds that what a device sends along mesh axes takes."""
    wiring = wire_axes(where, mesh)
    return {"+".join(axes): num_bytes / _rate(axes, wiring) for axes, num_bytes in sent.items()}


def _largest(collectives: Sequence[Collective], count: int = 12) -> list[dict]:
    """Return the collectives that send most, and what of the traced program they come from."""
    most = sorted(collectives, key=lambda c: -c.total_bytes)[:count]
    return [
        {
            "kind": c.kind,
            "axes": "+".join(c.axes),
            "shape": c.shape,
            "times": c.count,
            "gb": c.total_bytes / GB,
            "source": c.source[-80:],
        }
        for c in most
    ]


def _rate(axes: Sequence[str], wiring: Mapping[str, Wiring]) -> float:
    """Return what a device can send along several axes: between slices the slowest counts."""
    lie = [wiring[axis] for axis in axes]
    between = [each.bytes_per_second for each in lie if each.between_slices]
    return min(between) if between else sum(each.bytes_per_second for each in lie)


# --------------------------------------------------------------------------------- text


def plan_text(report: Mapping[str, Any]) -> str:
    """Return a plan as lines of text."""
    memory, seconds, flops = report["memory_gb"], report["seconds"], report["flops_a_step"]
    compiled = report.get("compiled")
    mesh = " × ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "one device"
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines = [
        f"{report['slice']}: {report['chips']} chip(s), {mesh}, {report['accumulate_steps']} "
        f"microbatch(es) a step, remat {report['remat']}",
        "",
        f"memory a chip, GB      {memory['total']:.2f} of {memory['limit']:.2f}: {verdict}",
    ]
    for name in (field.name for field in dataclasses.fields(StepMemory)):
        lines.append(f"  {name:<20} {memory[name]:.2f}")
    if compiled:
        split = ", ".join(f"{k} {v:.2f}" for k, v in compiled["memory_gb"].items() if k != "total")
        lines.append(f"  compiled             {compiled['memory_gb']['total']:.2f} ({split})")
    if "compiler" in report:
        lines.append(f"  compiler: {report['compiler']}")
    lines += [
        f"FLOPs a step           {flops['executed']:.3e} (of the model {flops['model']:.3e})",
        f"  products             {flops['products']:.3e}"
        + (f" (compiled {compiled['product_flops']:.3e})" if compiled else ""),
        f"  attention kernels    {flops['attention']:.3e}"
        + (f" ({_kernels(compiled['kernels'])})" if compiled else ""),
        "network, GB that a chip sends a step, and seconds",
    ]
    for axis, sent in report["network_gb"].items():
        lines.append(f"  {axis:<20} {sent:.2f}, {seconds['network'][axis]:.3f} s")
    for axes, sent in (compiled or {}).get("network_gb", {}).items():
        if compiled["network_seconds"][axes] > 1e-4:
            lines.append(
                f"  compiled {axes:<11} {sent:.2f}, {compiled['network_seconds'][axes]:.3f} s"
            )
    lines += [
        f"seconds a step         {seconds['predicted']:.3f} predicted, at least "
        f"{seconds['bound']:.3f}: bound by {report['bound_by']}",
        f"  compute {seconds['compute']:.3f}, of which idle {seconds['idle']:.3f}, memory "
        f"{seconds['memory']:.3f}, update {seconds['update']:.3f}",
        f"MFU                    {report['mfu_predicted']:.1%} predicted, at most "
        f"{report['mfu_bound']:.1%}"
        + (f"; as compiled at most {compiled['mfu_bound']:.1%}" if compiled else ""),
        f"tokens a day           {report['tokens_a_day']:.3e}",
        f"the whole run          {format_duration(report['days'] * 86400)}"
        + (
            "; its price needs run.chip_hour_dollars"
            if report["dollars"] is None
            else f", {report['dollars']:,.0f} dollars"
        ),
    ]
    return "\n".join(lines)


def _kernels(kernels: Mapping[str, int]) -> str:
    if not kernels:
        return "no kernel in the compiled step"
    return ", ".join(f"{count} × {name}" for name, count in kernels.items())


def candidates_text(reports: Sequence[Mapping[str, Any]], tried: int) -> str:
    """Return the best of a search as a table."""
    columns = "{:44} {:>5} {:>20} {:>9} {:>8} {:>9} {:>9}"
    head = ("mesh", "micro", "remat", "GB a chip", "MFU", "MFU bound", "compiled")
    lines = [f"{tried} that fit by the analytic model; the best:", columns.format(*head)]
    for report in reports:
        compiled = report.get("compiled")
        said = f"{compiled['memory_gb']['total']:.2f} GB" if compiled else ""
        mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
        lines.append(
            columns.format(
                mesh,
                report["accumulate_steps"],
                report["remat"],
                f"{report['memory_gb']['total']:.2f}",
                f"{report['mfu_predicted']:.1%}",
                f"{report['mfu_bound']:.1%}",
                "too large" if "compiler" in report else said,
            )
        )
    return "\n".join(lines)


def programs_text(row: Mapping[str, Any], *, first: bool) -> str:
    """Return the line of a group of runs, under a head where it is the first."""
    columns = "{:36} {:>14} {:>5} {:>18} {:>9} {:>8} {:>10}"
    head = columns.format(
        "group", "params", "runs", "GB a chip", "at height", "kernels", "compiled"
    )
    if not row["fits"]:
        line = columns.format(
            row["group"], f"{row['params']:,}", row["runs"], "too large", "", "", ""
        )
    else:
        line = columns.format(
            row["group"],
            f"{row['params']:,}",
            row["runs"],
            f"{row['state_gb']:.2f} + {row['temporary_gb']:.2f}",
            f"{row['height_gb']:.2f}",
            len(row["kernels"]),
            f"{row['compile_seconds']:.0f} s",
        )
    return f"{head}\n{line}" if first else line


def overrides_text(changes: Mapping[str, Any]) -> str:
    """Return changed fields as flags to paste."""
    return " ".join(shlex.quote(f"--config.{path}={value}") for path, value in changes.items())


def mesh_changes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return every mesh axis as a field and its value."""
    return {f"mesh.{axis}": sizes.get(axis, 1) for axis in MESH_AXES}
