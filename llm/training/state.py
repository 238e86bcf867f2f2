"""Everything a run must keep to go on bitwise. Second floor."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key, UInt32

from llm.models.transformer import (
    Model,
    init_params,
    logical_axes,
    param_shapes,
    scale_params,
)
from llm.parallel.rules import make_shardings
from llm.training.trainable import Rates, overlay, split


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class TrainState:
    """The state of one training run. Plain arrays only, so that any checkpoint format holds it."""

    step: Int[Array, ""]
    params: dict
    opt_state: Any
    ema_params: dict | None  # of what is trainable
    rng: UInt32[Array, " 2"]  # key data; a step's key is folded from it, so it never moves
    cursor: UInt32[Array, ""]  # global sequences consumed
    skipped_in_a_row: Int[Array, ""]  # steps whose gradient was not finite


class ParamSpec(NamedTuple):
    """Logical axes and shapes of parameters, for a tree that is not just a model's own."""

    axes: dict
    shapes: dict


def param_spec(model: Model) -> ParamSpec:
    """Return what `state_shardings` must know of a model's parameters."""
    return ParamSpec(logical_axes(model), param_shapes(model))


def init_state(
    model: Model | ParamSpec,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    *,
    ema: bool = False,
    params: dict | None = None,
    rates: Rates | None = None,
    init_scale: float = 1.0,
) -> TrainState:
    """Return a fresh state, each array made on its own devices; `params` replace random ones.
    (Of a spec they must be given.)

    Optimizer and average are of the parameters that `rates` (see `make_rates`) let learn. Random
    kernels and tables are multiplied by `init_scale`.
    """

    def fresh(key, given):
        if given is None:
            init = functools.partial(init_params, model)
            return fresh_state(init, optimizer, key, init_scale, ema=ema, rates=rates)
        return _new_state(given, optimizer, key, ema, rates)

    key = jax.random.key(seed)
    shardings = state_shardings(model, optimizer, mesh, ema=ema, rates=rates)
    return jax.jit(fresh, out_shardings=shardings)(key, params)


def fresh_state(
    init: Callable[[Key[Array, ""]], dict],
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    init_scale: ArrayLike,
    *,
    ema: bool = False,
    rates: Rates | None = None,
) -> TrainState:
    """Return a fresh state with the parameters of `init`: pure, to be jitted or vmapped."""
    params = scale_params(init(key), init_scale)
    return _new_state(params, optimizer, key, ema, rates)


def state_shardings(
    model: Model | ParamSpec,
    optimizer,
    mesh: Mesh,
    *,
    ema: bool = False,
    rates: Rates | None = None,
) -> TrainState:
    """Return the sharding of every array of the state, by the table of rules.

    Optimizer arrays shaped like a parameter lie as it does; the rest is replicated.

    Raises:
      ValueError: the mesh does not divide one of the model's dimensions.
    """
    axes, shapes = model if isinstance(model, ParamSpec) else param_spec(model)
    params = make_shardings(mesh, axes, shapes)
    known = {
        path: (shape.shape, sharding)
        for (path, shape), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(params), strict=True
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def lies(path, leaf):
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    state = state_shapes(shapes, optimizer, ema=ema, rates=rates)
    return jax.tree_util.tree_map_with_path(lies, state)


def state_shapes(
    shapes: dict, optimizer, *, ema: bool = False, rates: Rates | None = None
) -> TrainState:
    """Return the shapes of a fresh state whose parameters have these."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda p, k: _new_state(p, optimizer, k, ema, rates), shapes, key)


def averaged_params(state: TrainState) -> dict:
    """Return the parameters with the moving average in place of those that have one."""
    return state.params if state.ema_params is None else overlay(state.params, state.ema_params)


def _new_state(params, optimizer, key, ema: bool, rates: Rates | None) -> TrainState:
    trainable, _ = split(params, rates)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(trainable),
        ema_params=jax.tree.map(jnp.copy, trainable) if ema else None,
        rng=jax.random.key_data(key),
        cursor=jnp.uint32(0),
        skipped_in_a_row=jnp.int32(0),
    )
