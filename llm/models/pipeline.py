"""Pipeline parallelism: stages of layers on devices of their own, microbatches going round them.

Models floor. The circular schedule: with R repeats a stage holds R stretches of layers, and each
microbatch passes all S stages R times. Of M·R + S − 1 turns S − 1 are a device's idle ones, a share
that repeats make smaller. Sources: Huang et al. 2019, arXiv:1811.06965 (microbatches); Narayanan et
al. 2021, arXiv:2104.04473, section 2.2 (several stretches a stage).

One program for all stages: they are an axis of the arrays, which the mesh splits, and a turn ends
with a shift along it, the only communication of a turn but for tensor, context and expert axes. The
W groups of devices along data and fsdp are another such axis, with parameters of their own: so that
gradients are summed over them once a pass, in the parameters' type, and not once a turn.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llm.models.config import ComputeConfig
from llm.models.on_mesh import check_stages, num_microbatches
from llm.parallel.rules import (
    MeshAxes,
    constrain,
    gathered,
    inside_stage,
    partition_spec,
    ways_in_force,
)

Tree = Any
# (parameters of some cycles, x, inputs, index of the turn) → x, and what the layers report
Stage = Callable[[Tree, jax.Array, Tree, Int[Array, ""]], tuple[jax.Array, Tree]]

_HIDDEN = ("activation_batch", "activation_length", "activation_embed")
_GROUPS = ("data", "fsdp")  # mesh axes along which nothing is exchanged within a turn


def num_stages() -> int:
    """Return the stages of the mesh in force; 1: no pipeline."""
    return ways_in_force("layers")


def run_pipeline(
    stage: Stage,
    params: Tree,
    axes: Tree,
    x: Float[Array, "B T D"],
    inputs: Tree,
    compute: ComputeConfig,
) -> tuple[Float[Array, "B T D"], Tree]:
    """Return x after all cycles, and the layers' reports summed over microbatches.

    Args:
      params: of the cycles, stacked on axis 0.
      axes: their logical axes.
      inputs: arrays with a row for each of x's.

    Raises:
      ValueError: batch or layers cannot be cut as `compute` asks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages, groups = num_stages(), math.prod(mesh.shape[axis] for axis in _GROUPS)
    check_stages(jax.tree.leaves(params)[0].shape[0], stages, compute)
    devices = ways_in_force("activation_batch") // stages
    microbatches = num_microbatches(x.shape[0], devices, stages, compute.pipeline_microbatches)
    rows = _Rows(groups, stages, mesh.shape["expert"], microbatches)
    by_stage = functools.partial(
        _by_stage, stages=stages, groups=groups, repeats=compute.pipeline_repeats
    )
    params = jax.tree.map(by_stage, params, axes)
    with inside_stage():
        waiting, inputs = rows.cut(x), jax.tree.map(rows.cut, inputs)
        waiting = jnp.broadcast_to(waiting, (stages, *waiting.shape))
        waiting = _split(waiting, "pipeline", None, _GROUPS, "expert")
        waiting, reports = _turns(stage, params, waiting, inputs)
    # the first stage has them: a sum over stages that leaves each a part of the microbatches
    first = (jnp.arange(stages) == 0).reshape(-1, *(1 for _ in waiting.shape[1:]))
    out = _split(jnp.sum(jnp.where(first, waiting, 0), axis=0), "pipeline", _GROUPS)
    return constrain(rows.join(out), *_HIDDEN), reports


def _turns(stage: Stage, params: Tree, waiting, inputs: Tree):
    """Return `waiting` with every microbatch done, and the reports.

    `waiting` [S M W b T D] is where microbatches wait for the first stage, which alone uses its own
    row of it; a microbatch that has gone round comes back to its place. It has left the last stage
    by the time that the first one takes it up again, since M ≥ S.
    """
    stages, microbatches, groups = waiting.shape[:3]
    repeats = jax.tree.leaves(params)[0].shape[2]
    of_stage, of_group = jnp.arange(stages), jnp.arange(groups)
    of_all_groups = jax.vmap(stage, in_axes=(0, 0, 0, 0), spmd_axis_name=_GROUPS)
    of_all = jax.vmap(of_all_groups, in_axes=(0, 0, 0, 0), spmd_axis_name="pipeline")

    def turn(carry, number):
        waiting, shifted = carry
        taken = jax.lax.dynamic_index_in_dim(waiting, number % microbatches, 1, keepdims=False)
        first = (of_stage == 0).reshape(-1, *(1 for _ in taken.shape[1:]))
        x = _split(jnp.where(first, taken, shifted), "pipeline", _GROUPS)
        since = number - of_stage  # turns since the first microbatch reached the stage
        mine = jax.tree.map(
            lambda leaf: _split(leaf[since % microbatches], "pipeline", _GROUPS), inputs
        )
        repeat = jnp.clip(since // microbatches, 0, repeats - 1)
        kernels = jax.tree.map(lambda leaf: _pick(leaf, repeat), params)
        distinct = (number * stages + of_stage[:, None]) * groups + of_group
        x, report = of_all(kernels, x, mine, distinct)
        shifted = _split(_shift(x), "pipeline", _GROUPS)
        done = (number - stages + 1) % microbatches
        kept = jax.lax.dynamic_index_in_dim(waiting, done, axis=1, keepdims=False)
        back = jnp.where(number >= stages - 1, shifted, kept)
        waiting = jax.lax.dynamic_update_index_in_dim(waiting, back, done, axis=1)
        works = (since >= 0) & (since < microbatches * repeats)
        return (waiting, shifted), (report, jax.nn.one_hot(repeat, repeats) * works[:, None])

    numbers = jnp.arange(microbatches * repeats + stages - 1)
    carry = waiting, jnp.zeros_like(waiting[:, 0])
    (waiting, _), (reports, counted) = jax.lax.scan(turn, carry, numbers)
    return waiting, jax.tree.map(lambda leaf: _by_cycle(leaf, counted), reports)


@jax.custom_vjp
def _shift(x: jax.Array) -> jax.Array:
    """Move what each stage has made to the next: one permutation, and one on the way back."""
    return jnp.roll(x, 1, axis=0)


_shift.defvjp(lambda x: (_shift(x), None), lambda _, cotangent: (jnp.roll(cotangent, -1, axis=0),))


class _Rows(NamedTuple):
    """How the rows of a batch are cut: each device keeps those that it holds.

    Within a group (data, fsdp) a stage holds M / S microbatches of b rows, split over experts.
    """

    groups: int
    stages: int
    experts: int
    microbatches: int

    def cut(self, x: jax.Array) -> jax.Array:
        """[B …] → [M W b …], every stage with all M of them."""
        each = self.microbatches // self.stages
        rest = x.shape[1:]
        x = x.reshape(self.groups, self.stages, self.experts, each, -1, *rest)
        x = jnp.moveaxis(x, (1, 3), (0, 1)).reshape(self.microbatches, self.groups, -1, *rest)
        return _split(x, None, _GROUPS, "expert")

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        each, rest = self.microbatches // self.stages, x.shape[3:]
        x = x.reshape(self.stages, each, self.groups, self.experts, -1, *rest)
        return jnp.moveaxis(x, (0, 1), (1, 3)).reshape(-1, *rest)


def _split(x: jax.Array, *over: MeshAxes | str | None) -> jax.Array:
    """Constrain the leading axes of an array to mesh axes; the others stay as they lie."""
    rest = (PartitionSpec.UNCONSTRAINED for _ in x.shape[len(over) :])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*over, *rest))


def _by_stage(
    x: jax.Array, names: tuple[str | None, ...], *, stages: int, groups: int, repeats: int
) -> jax.Array:
    """[C …] → [S W R C/(S·R) …], gathered over fsdp: once a pass in place of once a turn."""
    x = x.reshape(repeats, stages, -1, *x.shape[1:])
    x = _split(x, None, "pipeline", None, *partition_spec(names[1:]))
    x = gathered(jnp.moveaxis(x, 1, 0), ("layers", None, None, *names[1:]))[:, None]
    x = jnp.broadcast_to(x, (stages, groups, *x.shape[2:]))
    return _split(x, "pipeline", _GROUPS)


def _pick(x: jax.Array, repeat: Int[Array, " S"]) -> jax.Array:
    """[S W R …] → [S W …]: of each stage the stretch whose turn it is."""
    if x.shape[2] == 1:
        return x[:, :, 0]
    return jax.vmap(lambda of_stage, r: of_stage[:, r], spmd_axis_name="pipeline")(x, repeat)


def _by_cycle(report: jax.Array, counted: jax.Array) -> jax.Array:
    """[turn S W C/(S·R) …] → [C …]: sums over groups, and turns in which a stage had work."""
    summed = jnp.einsum("tsr,tswc...->rsc...", counted.astype(report.dtype), report)
    return summed.reshape(-1, *summed.shape[3:])
