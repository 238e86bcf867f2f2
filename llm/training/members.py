"""Many runs of one shape in one program. Second floor.

Members differ in what is a number and not a shape: seed, order of the data, learning rate, weight
decay, scale of initialisation. Their states are stacked on axis 0 and the step of a single run is
mapped over it, so that each member is its own single run; small models leave most of an accelerator
idle, and together they fill it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt32

from llm.training.config import OptimizerConfig
from llm.training.optimizers import make_optimizer
from llm.training.schedules import Schedule
from llm.training.state import TrainState, fresh_state
from llm.training.step import Batch, LossFn, make_step_fn

# What a batch or state has once for all members, and what each has for itself.
_STATE_AXES = TrainState(
    step=None, params=0, opt_state=0, ema_params=0, rng=0, cursor=None, skipped_in_a_row=0
)


@dataclasses.dataclass(frozen=True)
class Member:
    """What tells one of the runs from the others. Muon's Adam follows the learning rate in the
    optimizer config's proportion."""

    learning_rate: float
    weight_decay: float
    seed: int = 0  # of initialisation and dropout
    data_seed: int = 0  # of the order of the data
    init_scale: float = 1.0


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Dials(NamedTuple):
    """The members' numbers as arrays, R of them."""

    learning_rate: Float[Array, " R"]
    weight_decay: Float[Array, " R"]
    seed: UInt32[Array, " R"]
    init_scale: Float[Array, " R"]


def make_dials(members: Sequence[Member]) -> Dials:
    """Return the numbers of the members that the program takes; data orders come in the batch."""
    numbers = {
        name: np.asarray([getattr(member, name) for member in members], dtype)
        for name, dtype in zip(
            Dials._fields, (np.float32, np.float32, np.uint32, np.float32), strict=True
        )
    }
    return Dials(**numbers)


def members_mesh(num_members: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of one axis over as many of the devices as divide the members evenly."""
    devices = list(jax.devices() if devices is None else devices)
    count = next(n for n in range(min(len(devices), num_members), 0, -1) if num_members % n == 0)
    return Mesh(np.asarray(devices[:count]), ("members",))


def init_members(
    init: Callable[[Key[Array, ""]], dict],
    axes: dict,
    config: OptimizerConfig,
    members: Sequence[Member],
    mesh: Mesh,
    *,
    width_ratio: float | None = None,
) -> TrainState:
    """Return the stacked fresh states of all members; `init` gives the parameters of a key."""

    def one(seed, weight_decay, init_scale) -> TrainState:
        optimizer = make_optimizer(config, axes, weight_decay=weight_decay, width_ratio=width_ratio)
        ema = config.ema_decay is not None
        return fresh_state(init, optimizer, jax.random.key(seed), init_scale, ema=ema)

    dials = make_dials(members)
    stacked = jax.vmap(one, out_axes=_STATE_AXES)
    arguments = (dials.seed, dials.weight_decay, dials.init_scale)
    return jax.jit(stacked, out_shardings=_shardings(mesh))(*arguments)


def make_members_step(
    loss_fn: LossFn,
    axes: dict,
    config: OptimizerConfig,
    schedule: Schedule,
    members: Sequence[Member],
    mesh: Mesh,
    *,
    width_ratio: float | None = None,
    accumulate_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return the jitted step of all members: (stacked state, batch) → (stacked state, metrics [R]).

    A batch has the members' own rows on axis 0, [R B …], or one row block [1 B …] for all of them;
    its cursor is one. To be called outside `jax.set_mesh`: members are spread over devices, and
    nothing of one member is.
    """

    def one(state, arrays, cursor, dials):
        optimizer = make_optimizer(
            config, axes, weight_decay=dials.weight_decay, width_ratio=width_ratio
        )
        step = make_step_fn(loss_fn, optimizer, config, schedule, accumulate_steps=accumulate_steps)
        return step(state, arrays | {"cursor": cursor}, dials.learning_rate)

    def step(state, arrays, cursor, dials, shared):
        if shared:
            arrays = jax.tree.map(lambda x: x[0], arrays)
        mapped = jax.vmap(
            one, in_axes=(_STATE_AXES, None if shared else 0, None, 0), out_axes=(_STATE_AXES, 0)
        )
        return mapped(state, arrays, cursor, dials)

    by_member = NamedSharding(mesh, PartitionSpec("members"))
    jitted = jax.jit(
        step, donate_argnums=0, static_argnums=4, out_shardings=(_shardings(mesh), by_member)
    )
    dials = jax.device_put(make_dials(members), by_member)

    def call(state, batch):
        arrays = {name: x for name, x in batch.items() if name != "cursor"}
        rows = next(iter(arrays.values())).shape[0]
        shared = rows == 1 and len(members) > 1
        replicated = NamedSharding(mesh, PartitionSpec())
        arrays = jax.device_put(arrays, replicated if shared else by_member)
        return jitted(state, arrays, jnp.uint32(batch["cursor"]), dials, shared)

    return call


def _shardings(mesh: Mesh) -> TrainState:
    """Return where a stacked state lies, as a prefix of its tree."""
    by_member = NamedSharding(mesh, PartitionSpec("members"))
    replicated = NamedSharding(mesh, PartitionSpec())
    return TrainState(*(replicated if axis is None else by_member for axis in _axes()))


def _axes() -> tuple:
    return tuple(getattr(_STATE_AXES, f.name) for f in dataclasses.fields(TrainState))


def member_of(state: TrainState, index: int) -> TrainState:
    """Return one member's state, as its single run has it."""
    axes = iter(_axes())
    fields = {
        f.name: getattr(state, f.name)
        if next(axes) is None
        else jax.tree.map(lambda x: x[index], getattr(state, f.name))
        for f in dataclasses.fields(TrainState)
    }
    return TrainState(**fields)
