"""Pipeline parallelism: stages of layers on devices of their own, microbatches going round them.

Models floor. The circular schedule: with R repeats a stage holds R stretches of layers, and each
microbatch passes all S stages R times. Of M·R + S − 1 turns S − 1 are a device's idle ones, a share
that repeats make smaller. Sources: Huang et al. 2019, arXiv:1811.06965 (microbatches); Narayanan et
al. 2021, arXiv:2104.04473, section 2.2 (several stretches a stage).

One program for all stages: stages are an axis of the arrays, which the mesh splits, and a turn ends
with a shift along it, the only communication within a pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llm.models.config import ComputeConfig
from llm.models.on_mesh import check_stages
from llm.parallel.rules import constrain, inside_stage, partition_spec, ways_in_force

Tree = Any
# (parameters of some cycles, x, inputs, index of the turn) → x, and what the layers report
Stage = Callable[[Tree, jax.Array, Tree, Int[Array, ""]], tuple[jax.Array, Tree]]

_HIDDEN = ("activation_batch", "activation_length", "activation_embed")


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
    stages, repeats = num_stages(), compute.pipeline_repeats
    check_stages(jax.tree.leaves(params)[0].shape[0], stages, compute)
    microbatches = _microbatches(x.shape[0], stages, compute.pipeline_microbatches)
    params = jax.tree.map(lambda leaf, names: _by_stage(leaf, names, stages, repeats), params, axes)
    with inside_stage():
        cut = functools.partial(_cut, microbatches=microbatches)
        waiting, inputs = cut(x), jax.tree.map(cut, inputs)
        waiting = _on_stages(jnp.broadcast_to(waiting, (stages, *waiting.shape)))
        waiting, reports = _turns(stage, params, waiting, inputs, repeats)
    # the first stage has them: a sum over stages that leaves each a part of the rows
    first = (jnp.arange(stages) == 0).reshape(-1, *(1 for _ in waiting.shape[1:]))
    out = jnp.sum(jnp.where(first, waiting, 0), axis=0)
    out = jnp.moveaxis(out, 0, 1).reshape(x.shape)
    return constrain(out, *_HIDDEN), reports


def _turns(stage: Stage, params: Tree, waiting, inputs: Tree, repeats: int):
    """Return `waiting` with every microbatch done, and the reports.

    `waiting` [S M b T D] is where microbatches wait for the first stage, which alone uses its own
    row of it; a microbatch that has gone round comes back to its place. It has left the last stage
    by the time that the first one takes it up again, since M ≥ S.
    """
    stages, microbatches = waiting.shape[:2]
    index = jnp.arange(stages)

    def turn(carry, number):
        waiting, shifted = carry
        arriving = number % microbatches
        taken = jax.lax.dynamic_index_in_dim(waiting, arriving, axis=1, keepdims=False)
        first = (index == 0).reshape(-1, 1, 1, 1)
        x = _on_stages(jnp.where(first, taken, shifted))
        since = number - index  # turns since the first microbatch reached the stage
        mine = jax.tree.map(lambda leaf: _on_stages(leaf[since % microbatches]), inputs)
        repeat = jnp.clip(since // microbatches, 0, repeats - 1)
        of_stage = jax.tree.map(lambda leaf: _pick(leaf, repeat), params)
        x, report = jax.vmap(stage, in_axes=(0, 0, 0, 0), spmd_axis_name="pipeline")(
            of_stage, x, mine, number * stages + index
        )
        shifted = _on_stages(jnp.roll(x, 1, axis=0))
        done = (number - stages + 1) % microbatches
        kept = jax.lax.dynamic_index_in_dim(waiting, done, axis=1, keepdims=False)
        back = jnp.where(number >= stages - 1, shifted, kept)
        waiting = jax.lax.dynamic_update_index_in_dim(waiting, back, done, axis=1)
        works = (since >= 0) & (since < microbatches * repeats)
        return (waiting, shifted), (report, jax.nn.one_hot(repeat, repeats) * works[:, None])

    numbers = jnp.arange(microbatches * repeats + stages - 1)
    carry = waiting, jnp.zeros_like(waiting[:, 0])
    (waiting, _), (reports, counted) = jax.lax.scan(turn, carry, numbers)
    summed = jax.tree.map(lambda leaf: _by_cycle(leaf, counted), reports)
    return waiting, summed


def _cut(x: jax.Array, microbatches: int) -> jax.Array:
    """[B …] → [M B/M …]; strided, so that each device keeps the rows that it holds."""
    x = constrain(x, "activation_batch", *(None for _ in x.shape[1:]))
    x = jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)
    return constrain(x, None, "activation_batch", *(None for _ in x.shape[2:]))


def _on_stages(x: jax.Array) -> jax.Array:
    """Constrain an array whose axis 0 is the stages; the rest stays as it lies."""
    rest = (PartitionSpec.UNCONSTRAINED for _ in x.shape[1:])
    return jax.lax.with_sharding_constraint(x, PartitionSpec("pipeline", *rest))


def _by_stage(x: jax.Array, names: tuple[str | None, ...], stages: int, repeats: int) -> jax.Array:
    """[C …] → [S R C/(S·R) …], gathered over fsdp: once a pass in place of once a turn."""
    whole = tuple(None if name == "embed" else name for name in names[1:])
    x = x.reshape(repeats, stages, -1, *x.shape[1:])
    x = jax.lax.with_sharding_constraint(
        x, PartitionSpec(None, "pipeline", None, *partition_spec(whole))
    )
    return jnp.moveaxis(x, 1, 0)


def _pick(x: jax.Array, repeat: Int[Array, " S"]) -> jax.Array:
    """[S R …] → [S …]: of each stage the stretch whose turn it is."""
    if x.shape[1] == 1:
        return x[:, 0]
    return jax.vmap(lambda of_stage, r: of_stage[r], spmd_axis_name="pipeline")(x, repeat)


def _by_cycle(report: jax.Array, counted: jax.Array) -> jax.Array:
    """[turn S C/(S·R) …] → [C …]: sums over the turns in which a stage had something to do."""
    summed = jnp.einsum("tsr,tsc...->rsc...", counted.astype(report.dtype), report)
    return summed.reshape(-1, *report.shape[3:])


def _microbatches(batch: int, stages: int, asked: int | None) -> int:
    """Return into how many microbatches to cut a batch: as asked, or two a stage, or one."""
    with inside_stage():
        ways = ways_in_force("activation_batch")
    for number in (2 * stages, stages) if asked is None else (asked,):
        if batch % (number * ways) == 0:
            return number
    raise ValueError(
        f"a batch of {batch} sequences does not divide into {number} microbatches "
        f"(compute.pipeline_microbatches={asked}) over {ways} devices each; choose another batch, "
        "number or mesh"
    )
