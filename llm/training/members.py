"""Many runs of one shape in one program. Second floor.

Members differ in what is a number and not a shape: seed, order of the data, learning rate, weight
decay, scale of initialisation. Their states are stacked on axis 0 and the step of a single run is
mapped over it, so that each member is its own single run; small models leave most of an accelerator
idle, and together they fill it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt32

from llm.training.config import OptimizerConfig
from llm.training.optimizers import make_optimizer
from llm.training.schedules import Schedule
from llm.training.state import TrainState, fresh_state
from llm.training.step import LossFn, make_step_fn

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


@dataclasses.dataclass(frozen=True)
class MemberRuns:
    """Runs of one shape: what each of them trains, and what tells them apart.

    `init` gives the parameters of a key, `axes` their logical axes.
    """

    members: Sequence[Member]
    init: Callable[[Key[Array, ""]], dict]
    axes: dict
    loss_fn: LossFn
    optimizer: OptimizerConfig
    schedule: Schedule
    width_ratio: float | None = None
    accumulate_steps: int = 1

    def init_state(self, mesh: Mesh) -> TrainState:
        """Return the stacked fresh states."""
        return jax.jit(self._init, out_shardings=_shardings(mesh))(*self._init_dials())

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """Return the shapes of the stacked states and where they lie, on devices not here too."""
        shapes = jax.eval_shape(self._init, *self._init_dials())
        places = jax.tree.broadcast(_shardings(mesh), shapes)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )

    def make_step(self, mesh: Mesh) -> "MembersStep":
        """Return the jitted step of all members: each the step of its single run."""

        def one(state, arrays, cursor, dials):
            optimizer = self._optimizer(dials.weight_decay)
            step = make_step_fn(
                self.loss_fn,
                optimizer,
                self.optimizer,
                self.schedule,
                accumulate_steps=self.accumulate_steps,
            )
            return step(state, arrays | {"cursor": cursor}, dials.learning_rate)

        def step(state, arrays, cursor, dials, shared):
            if shared:
                arrays = jax.tree.map(lambda x: x[0], arrays)
            in_axes = (_STATE_AXES, None if shared else 0, None, 0)
            mapped = jax.vmap(one, in_axes=in_axes, out_axes=(_STATE_AXES, 0))
            return mapped(state, arrays, cursor, dials)

        jitted = jax.jit(
            step, donate_argnums=0, static_argnums=4, out_shardings=(_shardings(mesh), _over(mesh))
        )
        return MembersStep(jitted, make_dials(self.members), mesh)

    def _init(self, seed, weight_decay, init_scale) -> TrainState:
        def one(seed, weight_decay, init_scale) -> TrainState:
            ema = self.optimizer.ema_decay is not None
            optimizer, key = self._optimizer(weight_decay), jax.random.key(seed)
            return fresh_state(self.init, optimizer, key, init_scale, ema=ema)

        return jax.vmap(one, out_axes=_STATE_AXES)(seed, weight_decay, init_scale)

    def _init_dials(self) -> tuple[np.ndarray, ...]:
        dials = make_dials(self.members)
        return dials.seed, dials.weight_decay, dials.init_scale

    def _optimizer(self, weight_decay):
        return make_optimizer(
            self.optimizer, self.axes, weight_decay=weight_decay, width_ratio=self.width_ratio
        )


class MembersStep:
    """The jitted step of all members: (stacked state, batch) → (stacked state, metrics [R]).

    A batch has the members' own rows on axis 0, [R B …], or one row block [1 B …] for all of them;
    its cursor is one. To be called outside `jax.set_mesh`: members are spread over devices, and
    nothing of one member is.
    """

    def __init__(self, jitted: Any, dials: Dials, mesh: Mesh):
        self._jitted, self._dials, self._mesh = jitted, dials, mesh

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        arrays, shared = self._rows(batch)
        arrays = jax.device_put(arrays, _alike(self._mesh) if shared else _over(self._mesh))
        return self._jitted(state, arrays, jnp.uint32(batch["cursor"]), self._placed_dials, shared)

    def lower(self, state: TrainState, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Lower for a batch of such shapes and the mesh's devices, which need not be here."""
        arrays, shared = self._rows(batch)
        place = _alike(self._mesh) if shared else _over(self._mesh)
        shapes = [_shapes(x, at) for x, at in ((arrays, place), (self._dials, _over(self._mesh)))]
        cursor = jax.ShapeDtypeStruct((), jnp.uint32, sharding=_alike(self._mesh))
        return self._jitted.lower(state, shapes[0], cursor, shapes[1], shared)

    @functools.cached_property
    def _placed_dials(self) -> Dials:  # not when made: a step to be lowered has no devices here
        return jax.device_put(self._dials, _over(self._mesh))

    def _rows(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        arrays = {name: x for name, x in batch.items() if name != "cursor"}
        rows = next(iter(arrays.values())).shape[0]
        return arrays, rows == 1 and len(self._dials.seed) > 1


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("members"))


def _alike(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _shardings(mesh: Mesh) -> TrainState:
    """Return where a stacked state lies, as a prefix of its tree."""
    return TrainState(*(_alike(mesh) if axis is None else _over(mesh) for axis in _axes()))


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
