"""Experts that take so many tokens of a sequence and no more. Models floor.

The arrays have the same shapes on every mesh, and constraints alone say where they lie: the
compiler makes the all-to-alls.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm.models.config import TransformerConfig
from llm.models.feed_forward import Hidden
from llm.models.router import Routing
from llm.parallel.rules import constrain

Buffers = Float[Array, "B E C D"]


def capacity_of(config: TransformerConfig, length_tokens: int) -> int:
    """Return C, how many tokens of a sequence of that length an expert takes."""
    mean = config.experts_per_token * length_tokens / config.num_experts
    return min(length_tokens, math.ceil(config.expert_capacity_factor * mean))


def with_capacity(
    x: Hidden,
    routing: Routing,
    real: Bool[Array, "B T"] | None,
    experts: Callable[[Buffers], Buffers],
    capacity: int,
) -> tuple[Hidden, Float[Array, ""]]:
    """Return each token's weighted sum of experts' outputs, and how many choices found no room.

    An expert takes a sequence's tokens in their order, so that none depends on later ones. Tokens
    are moved by their index: products with one-hot matrices, as in GShard and Switch, would cost
    2T / 3F times what gated experts themselves do (T tokens a sequence, F their width).

    Source: Fedus et al. 2021, arXiv:2101.03961, section 2.2, eq. 3; a sequence is what a group is
    to Lepikhin et al. 2020, arXiv:2006.16668 (GShard), section 2.2.
    """
    b, t, d = x.shape
    e = routing.scores.shape[-1]
    places, kept = _places(routing.experts, real, e, capacity)
    rows = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[:, None], places.shape[1:])
    nothing = jnp.full(e * capacity, t, jnp.int32)  # a token that is not there
    tokens = jax.vmap(lambda at: nothing.at[at].set(rows, mode="drop"))(places)
    buffers = jnp.take_along_axis(x, tokens[..., None], axis=1, mode="fill", fill_value=0)
    axes = ("activation_expert_batch", "activation_experts", "activation_capacity")
    axes = (*axes, "activation_embed")
    buffers = constrain(buffers.reshape(b, e, capacity, d), *axes)
    out = constrain(experts(buffers), *axes)
    out = constrain(out, "activation_batch", None, None, "activation_embed")
    out = jnp.take_along_axis(
        out.reshape(b, e * capacity, d),
        places.reshape(b, -1, 1),
        axis=1,
        mode="fill",
        fill_value=0,
    ).reshape(*places.shape, d)
    weights = routing.weights.astype(out.dtype)
    y = jnp.einsum("BTAD,BTA->BTD", out, weights)
    wanted = kept.size if real is None else jnp.sum(real) * kept.shape[-1]
    dropped = jnp.asarray(wanted - jnp.sum(kept), jnp.float32)
    return constrain(y, "activation_batch", "activation_length", "activation_embed"), dropped


def _places(
    experts: Int[Array, "B T A"], real: Bool[Array, "B T"] | None, num_experts: int, capacity: int
) -> tuple[Int[Array, "B T A"], Bool[Array, "B T A"]]:
    """Return each choice's place among E·C, E·C where it has none, and which have one."""
    chosen = jnp.any(experts[..., None] == jnp.arange(num_experts), axis=2)
    if real is not None:
        chosen &= real[..., None]
    before = jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1
    place = jnp.take_along_axis(before, experts, axis=-1)
    kept = place < capacity
    if real is not None:
        kept &= real[..., None]
    return jnp.where(kept, experts * capacity + place, num_experts * capacity), kept
