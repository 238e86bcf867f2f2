"""Everything a run must keep to go on bitwise. Second floor."""

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from llm.models.transformer import Transformer, init_params, logical_axes, param_shapes
from llm.parallel.rules import make_shardings


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class TrainState:
    """The state of one training run. Plain arrays only, so that any checkpoint format holds it."""

    step: Int[Array, ""]
    params: dict
    opt_state: Any
    ema_params: dict | None
    rng: UInt32[Array, " 2"]  # key data; a step's key is folded from it, so it never moves
    cursor: UInt32[Array, ""]  # global sequences consumed
    skipped_in_a_row: Int[Array, ""]  # steps whose gradient was not finite


def init_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    *,
    ema: bool = False,
    params: dict | None = None,
) -> TrainState:
    """Return a fresh state, each array made on its own devices; `params` replace random ones."""

    def fresh(key, given):
        return _new_state(init_params(model, key) if given is None else given, optimizer, key, ema)

    key = jax.random.key(seed)
    shardings = state_shardings(model, optimizer, mesh, ema=ema)
    return jax.jit(fresh, out_shardings=shardings)(key, params)


def state_shardings(model, optimizer, mesh: Mesh, *, ema: bool = False) -> TrainState:
    """Return the sharding of every array of the state, by the table of rules.

    Optimizer arrays shaped like a parameter lie as it does; the rest is replicated.

    Raises:
      ValueError: the mesh does not divide one of the model's dimensions.
    """
    shapes = param_shapes(model)
    params = make_shardings(mesh, logical_axes(model), shapes)
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

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda p, k: _new_state(p, optimizer, k, ema), shapes, key)
    return jax.tree_util.tree_map_with_path(lies, state)


def _new_state(params, optimizer, key, ema: bool) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        rng=jax.random.key_data(key),
        cursor=jnp.uint32(0),
        skipped_in_a_row=jnp.int32(0),
    )
