"""What the plan of a stage after pretraining is made of: its programs, and the arrays they take."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm.data.config import ComparisonsConfig
from llm.models.config import TransformerConfig
from llm.models.transformer import logical_axes, param_shapes
from llm.parallel.hosts import check_batch
from llm.parallel.rules import batch_sharding, make_shardings
from llm.rl.models import Models
from llm.scaling.work import attention_flops, grouped_flops
from llm.training.ahead import placed
from llm.training.state import TrainState
from llm.training.trainable import Rates, split


class KernelWork(NamedTuple):
    """FLOPs of what are kernels in some programs and products in others."""

    attention: float = 0.0
    experts: float = 0.0

    def of(self, names: Iterable[str]) -> float:
        """Return those of a program that calls these kernels."""
        called = "".join(names)
        return self.attention * ("mha" in called) + self.experts * ("gmm" in called)


def kernel_work(
    shape: TransformerConfig, config: Any, length: int, tokens: float, **passes: bool
) -> KernelWork:
    """Return the work of a forward and a backward pass over so many tokens in rows of a length, of
    a forward pass alone with `backward=False`. Under an adapter experts are frozen."""
    adapted = config.adapter.rank > 0
    return KernelWork(
        tokens * attention_flops(shape, config.compute, length, **passes),
        tokens * grouped_flops(shape, config.compute, frozen=adapted, **passes),
    )


class StageProgram(NamedTuple):
    """A program of a stage's step. Bytes are of one device, FLOPs of all together."""

    name: str
    lower: Callable[[], jax.stages.Lowered] | None  # None: runs by itself on each host
    kernels: KernelWork = KernelWork()
    products: float = 0.0  # FLOPs, where it is not compiled
    moved: float = 0.0  # the least that is read and written
    beside: float = 0.0  # what lies there in the meantime and is no argument of it
    open_turns: int | None = None  # of the loop over tokens


class Stage(NamedTuple):
    """What a stage's step is made of, on a mesh."""

    mesh: Mesh
    resident: dict[str, float]  # bytes of a device by what they hold, from step to step
    programs: list[StageProgram]
    tokens: int  # of a step
    num_steps: int | None  # None: known when the data is there


def comparison_batch(config: ComparisonsConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of comparisons (llm/data/comparisons.py) and where they lie."""
    prompts, slots = config.batch_prompts, config.max_responses
    wide, each = (prompts, slots * config.length_tokens), (prompts, slots)
    shapes = {
        "tokens": (wide, jnp.int32),
        "segment_ids": (wide, jnp.int32),
        "positions": (wide, jnp.int32),
        "response_mask": (wide, jnp.float32),
        "levels": (each, jnp.float32),
        "present": (each, jnp.bool_),
        "margins": ((prompts,), jnp.float32),
        "cursor": ((), jnp.uint32),
    }
    batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    check_batch(batch, mesh)
    return {name: placed(x, batch_sharding(mesh, x.shape)) for name, x in batch.items()}


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


def resident_bytes(state) -> dict[str, float]:
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
