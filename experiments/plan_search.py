"""The search of `experiments.plan`: meshes, microbatches and remat policies, by formulas first."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

from configs.schema import PretrainConfig
from experiments.plan_report import mesh_changes, overrides_text
from experiments.plan_step import workload_of
from llm.models.config import ComputeConfig
from llm.parallel.config import MeshConfig
from llm.scaling.hardware import Slice
from llm.scaling.plan import Plan, make_plan
from llm.scaling.workload import batch_parts, mesh_sizes

REMAT = get_args(get_type_hints(ComputeConfig)["remat"])
_MOST_TENSOR, _MOST_CONTEXT = 16, 16


class Candidate(NamedTuple):
    """A config that fits by the analytic model, and its plan."""

    config: PretrainConfig
    plan: Plan


def search(config: PretrainConfig, where: Slice) -> list[Candidate]:
    """Return the configs that fit a slice by the analytic model, those of least time first.

    Varied are the mesh, accumulate_steps and compute.remat; not what is learnt.

    Raises:
      ValueError: none fits.
    """
    found, least = [], None
    for sizes in _meshes(config, where):
        for changed in _variants(config, sizes):
            try:
                plan = make_plan(workload_of(changed), sizes, where)
            except ValueError:  # the mesh divides the model or its batch in no such way
                continue
            if plan.fits:
                found.append(Candidate(changed, plan))
            elif least is None or plan.memory.total < least:
                least = plan.memory.total
    if not found:
        needs = "no mesh divides the model and its batch"
        if least is not None:
            needs = f"the smallest needs {least / 1e9:.1f} GB a chip"
        raise ValueError(
            f"nothing fits {where.name}, whose chips have {where.chip.memory_bytes / 1e9:.1f} GB: "
            f"{needs}; take more chips, or more sequences a batch"
        )
    # Among equals the one with memory to spare.
    return sorted(found, key=lambda c: (round(c.plan.time.predicted, 4), c.plan.memory.total))


def best_overrides(
    config: PretrainConfig, candidates: Sequence[Candidate], reports: Sequence[dict]
) -> str:
    """Return the best candidate's difference as flags to paste: of those compiled, by the
    compiler's own account."""
    compiled = [i for i, report in enumerate(reports) if "compiled" in report]
    if compiled:
        best = min(compiled, key=lambda i: reports[i]["compiled"]["seconds_bound"])
    else:
        best = next((i for i, report in enumerate(reports) if report["fits"]), 0)
    return overrides_text(changes(config, candidates[best].config))


def changes(old: PretrainConfig, new: PretrainConfig) -> dict[str, Any]:
    """Return the fields that a candidate changes; the mesh whole."""
    found = mesh_changes(dataclasses.asdict(new.mesh))
    if new.accumulate_steps != old.accumulate_steps:
        found["accumulate_steps"] = new.accumulate_steps
    if new.compute.remat != old.compute.remat:
        found["compute.remat"] = new.compute.remat
    return found


def _meshes(config: PretrainConfig, where: Slice) -> Iterator[dict[str, int]]:
    """Yield the sizes of meshes over all chips of a slice. Data parallelism goes between slices;
    within one fsdp does what it does in less memory."""
    experts = getattr(config.model, "num_experts", 0)
    pipelined = hasattr(config.compute, "pipeline_repeats")
    chips, slices = where.slice_chips, where.num_slices
    for tensor, context, expert, pipeline in itertools.product(
        _divisors(chips, _MOST_TENSOR),
        _divisors(chips, _MOST_CONTEXT if config.data.length_tokens >= 8192 else 1),
        _divisors(chips, experts or 1),
        _divisors(chips, config.model.num_cycles if pipelined else 1),
    ):
        rest, left = divmod(chips, tensor * context * expert * pipeline)
        if not left:
            yield mesh_sizes((slices, rest, expert, pipeline, context, tensor))
            if rest > 1 and slices == 1:
                yield mesh_sizes((rest, 1, expert, pipeline, context, tensor))


def _variants(config: PretrainConfig, sizes: dict[str, int]) -> Iterator[PretrainConfig]:
    mesh = MeshConfig(**sizes)
    parts = batch_parts(sizes)
    rows, left = divmod(config.data.batch_sequences, parts)
    if left:
        return
    for micro, remat in itertools.product(_divisors(rows, rows), REMAT):
        yield dataclasses.replace(
            config,
            mesh=mesh,
            compute=dataclasses.replace(config.compute, remat=remat),
            accumulate_steps=micro,
        )


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
