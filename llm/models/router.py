"""Which experts a token goes to, and the sums from which their balance is judged. Models floor."""

from typing import NamedTuple, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm.models.config import TransformerConfig
from llm.models.feed_forward import Hidden, readout_init
from llm.models.projection import Projection

COLLECTION = "router"  # of variables: what `apply(…, mutable=[COLLECTION])` brings back


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Routing(NamedTuple):
    """Each token's A = experts_per_token experts, in float32 unless the model is in float64."""

    experts: Int[Array, "B T A"]
    weights: Float[Array, "B T A"]  # of their outputs
    scores: Float[Array, "B T E"]  # of all experts, as a distribution
    log_z: Float[Array, "B T"]  # logsumexp of the router's logits


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class RouterSums:
    """What routers did with the tokens that are no padding: one more axis in front for layers.

    Sums and counts alone, so that those of parts of a batch add up to those of the batch.
    """

    counts: Float[Array, "*L E"]  # tokens that chose the expert, dropped ones too
    scores: Float[Array, "*L E"]
    squared_log_z: Float[Array, "*L"]
    dropped: Float[Array, "*L"]  # choices that found no room
    tokens: Float[Array, "*L"]


class Router(nn.Module):
    """A linear map to the experts' scores, of which the highest are chosen.

    Computed in float32, at full precision on chips that would round: nearly equal scores must not
    change places between one machine and another.

    Source: softmax over all experts and then the choice, Jiang et al. 2024, arXiv:2401.04088,
    section 2.1, which is the same as its softmax over the chosen ones; sigmoids, renormalised over
    the chosen, DeepSeek-AI 2024, arXiv:2412.19437, eq. 13 to 15, without its bias on the choice.
    """

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Hidden) -> Routing:
        c = self.config
        project = Projection(
            "BTD,DE->BTE",
            (c.width, c.num_experts),
            ("embed", "router"),
            readout_init(c),
            dtype=jnp.promote_types(jnp.float32, self.dtype),
            multiplier=1 / (c.width_ratio or 1.0),
            name="scores",
        )
        with jax.default_matmul_precision("highest"):
            logits = project(x)
        if c.router_scores == "softmax":
            scores = shares = jax.nn.softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
        weights, experts = jax.lax.top_k(scores, c.experts_per_token)
        if c.router_renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(experts, weights * c.router_scale, shares, jax.nn.logsumexp(logits, axis=-1))


def sum_routing(
    routing: Routing, real: Bool[Array, "B T"] | None, dropped: Float[Array, ""]
) -> RouterSums:
    """Return the sums of one layer."""
    real = jnp.ones(routing.log_z.shape, bool) if real is None else real
    here = real.astype(routing.scores.dtype)
    num_experts = routing.scores.shape[-1]
    chosen = routing.experts[..., None] == jnp.arange(num_experts)
    return RouterSums(
        counts=jnp.sum(jnp.where(chosen, here[..., None, None], 0.0), axis=(0, 1, 2)),
        scores=jnp.sum(routing.scores * here[..., None], axis=(0, 1)),
        squared_log_z=jnp.sum(jnp.square(routing.log_z) * here),
        dropped=dropped.astype(here.dtype),
        tokens=jnp.sum(here),
    )


def gather_sums(variables: dict) -> RouterSums:
    """Return the sums that all layers left in the collection, layers on axis 0, in any order."""
    is_sums = lambda x: isinstance(x, RouterSums)  # noqa: E731
    layers = [x for x in jax.tree.leaves(variables, is_leaf=is_sums) if is_sums(x)]

    def flat(layer: RouterSums) -> RouterSums:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[layer.tokens.ndim :]), layer)

    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(flat, layers))
