"""What the plan of a stage after pretraining is made of: its programs, and the arrays they take."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llm.data.comparisons import empty_batch
from llm.data.config import ComparisonsConfig
from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import logical_axes, param_shapes
from llm.parallel.hosts import check_batch
from llm.parallel.rules import batch_sharding, make_shardings
from llm.rl.models import Models
from llm.scaling.work import attention_flops, grouped_flops
from llm.training.ahead import placed
from llm.training.state import TrainState
from llm.training.trainable import Rates, split


class Passes(NamedTuple):
    """Forward passes over tokens in rows of a length, and backward ones where it says so."""

    tokens: float
    length: int
    backward: bool = True


def kernel_flops(
    shape: TransformerConfig, compute: ComputeConfig, rates: Rates | None, *all_passes: Passes
) -> float:
    """Return the FLOPs of what kernels compute on TPUs: attention where splash can run, and experts
    that drop no token (but for an adapter's factors)."""
    total = 0.0
    for tokens, length, backward in all_passes:
        if runs_splash(shape, compute, length):
            total += tokens * attention_flops(shape, compute, length, backward=backward)
        if shape.moe_layers:
            learn = _experts_learn(rates)
            total += tokens * grouped_flops(shape, compute, backward=backward, learn=learn)
    return total


def runs_splash(shape: TransformerConfig, compute: ComputeConfig, length: int) -> bool:
    """Whether attention over whole rows of a length is splash's on TPUs, as models choose it
    (llm/models/attention_kernels.py)."""
    fits = length % 128 == 0 and shape.attention == "causal" and shape.positions != "alibi"
    return fits and compute.attention_kernel in ("auto", "splash")


def _experts_learn(rates: Rates | None) -> bool:
    leaves = jax.tree_util.tree_leaves_with_path(rates or {})
    of_experts = [rate for path, rate in leaves if jax.tree_util.DictKey("experts") in path]
    return rates is None or any(np.any(rate) for rate in of_experts)


class StageProgram(NamedTuple):
    """A program of a stage's step. Bytes are of one device, FLOPs of all together."""

    name: str
    lower: Callable[[], jax.stages.Lowered] | None  # None: runs by itself on each host
    kernels: float = 0.0  # FLOPs of its kernels
    products: float = 0.0  # FLOPs, where it is not compiled
    moved: float = 0.0  # the least that is read and written
    beside: float = 0.0  # what lies there in the meantime and is no argument of it
    open_turns: int | None = None  # of the loop over tokens


class Stage(NamedTuple):
    """What a stage's step is made of, on a mesh."""

    mesh: Mesh
    params: int  # of the model
    resident: dict[str, float]  # bytes of a device by what they hold, from step to step
    programs: list[StageProgram]
    tokens: int  # of a step
    num_steps: int | None  # None: known when the data is there
    notes: tuple[str, ...] = ()  # what was assumed


def comparison_batch(config: ComparisonsConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of comparisons and where they lie."""
    batch = empty_batch(config.batch_prompts, config) | {"cursor": np.uint32(0)}
    check_batch(batch, mesh)
    return {name: placed(x, batch_sharding(mesh, x.shape)) for name, x in batch.items()}


def num_score_params(shape: TransformerConfig) -> int:
    """Return the parameters of a trunk under a scalar head."""
    shapes = param_shapes(ScalarModel(shape, ComputeConfig()))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def device_bytes(tree: Any) -> float:
    """Return the bytes that one device holds of arrays given by shape and sharding."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def updated_bytes(state: TrainState, rates: Rates | None) -> float:
    """Return the least that an update reads and writes: what is frozen is read alone."""
    learnt = split(state.params, rates)[0], state.opt_state, state.ema_params
    return device_bytes(state.params) + device_bytes(learnt) + device_bytes(learnt[1:])


def resident_bytes(state: TrainState) -> dict[str, float]:
    """Return what a device holds of a state from step to step."""
    return {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes((state.opt_state, state.ema_params)),
    }


def frozen_models(models: Models, mesh: Mesh) -> dict[str, Any]:
    """Return the reference that does not stand on the policy's trunk."""
    if models.shared:
        return {}
    shapes = param_shapes(models.reference)
    lies = make_shardings(mesh, logical_axes(models.reference), shapes)
    return {"reference": jax.tree.map(placed, shapes, lies)}


def reference_bytes(frozen: dict[str, Any]) -> dict[str, float]:
    return {"reference": device_bytes(frozen)} if frozen else {}
