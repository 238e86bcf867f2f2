"""A training step compiled for devices that need not be here: does a run fit? Second floor.

libtpu compiles for a TPU topology on any machine: `topology_devices("v5p:8x8x8")`.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.models.transformer import Model
from llm.parallel.rules import batch_sharding
from llm.training.state import (
    ParamSpec,
    TrainState,
    param_spec,
    state_shapes,
    state_shardings,
)
from llm.training.trainable import Rates


def topology_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """Return the devices of a TPU topology, as v5e:4x4, without one being here; or of several.

    Raises:
      ValueError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks a cloud's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # else it complains that this machine is no worker of a pod; any name will do
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=num_slices, **_host(name)
        ).devices
    except Exception as error:  # of what type depends on what is missing
        raise ValueError(
            f"no devices for {name!r}: {error}; topologies are named v5e:4x4, v5p:4x4x4, v6e:8x8, "
            "and libtpu must be installed (extra [tpu])"
        ) from error


def _host(topology: str) -> dict[str, Sequence[int]]:
    """Return how the chips of a host lie where a slice is smaller than the usual host of 2x2."""
    shape = [int(n) for n in topology.partition(":")[2].split("x") if n.isdigit()]
    if 0 < math.prod(shape) < 4:
        return {"chips_per_host_bounds": (*shape, 1)[:3]}
    return {}


def abstract_state(
    model: Model | ParamSpec,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
    rates: Rates | None = None,
) -> TrainState:
    """Return the shapes of a fresh state and where they lie."""
    spec = model if isinstance(model, ParamSpec) else param_spec(model)
    shapes = state_shapes(spec.shapes, optimizer, ema=ema, rates=rates)
    lies = state_shardings(spec, optimizer, mesh, ema=ema, rates=rates)
    return jax.tree.map(placed, shapes, lies)


def batch_shapes(num_sequences: int, length_tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a packed batch, its cursor left out."""
    names = ("tokens", "targets", "segment_ids", "positions", "loss_weights")
    shape = num_sequences, length_tokens
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "loss_weights" else jnp.int32)
        for name in names
    }


def abstract_batch(
    mesh: Mesh, num_sequences: int, length_tokens: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a packed batch and where they lie."""
    shapes = batch_shapes(num_sequences, length_tokens)
    rows = {name: placed(x, batch_sharding(mesh, x.shape)) for name, x in shapes.items()}
    replicated = NamedSharding(mesh, PartitionSpec())
    return rows | {"cursor": jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated)}


def placed(x, sharding) -> jax.ShapeDtypeStruct:
    """Return an array's shape and where it lies."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class ChipMemory(NamedTuple):
    """What a compiled step needs on each chip, in bytes."""

    state: int  # parameters, optimizer, batch: lives through the step
    temporaries: int  # gradients, activations, scratch: each buffer counted
    height: int  # the most that lives at once, the state included

    @property
    def total(self) -> int:
        return self.state + self.temporaries


def chip_memory(compiled: jax.stages.Compiled) -> ChipMemory:
    """Return the compiler's own account of a step's memory a chip."""
    found = compiled.memory_analysis()
    # The state that comes out takes the place of the one that went in (it is donated).
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    state = found.argument_size_in_bytes + outputs
    return ChipMemory(state, found.temp_size_in_bytes, found.peak_memory_in_bytes)
