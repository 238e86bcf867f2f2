"""Losses that keep the experts of a mixture in use, from sums of what its routers did. First floor.

Sums are of each layer's tokens (`llm.models.router.RouterSums`): of parts of a batch they add up.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

PerExpert = Float[Array, "L E"]
PerLayer = Float[Array, " L"]


def load_balance_loss(counts: PerExpert, scores: PerExpert, tokens: PerLayer) -> Float[Array, ""]:
    """Return E · Σ f·P, the mean over layers: f is an expert's share of the tokens, which sum to
    experts_per_token, P its mean score. In perfect balance it is experts_per_token.

    The gradient is through the scores alone. It is a product of sums over the batch: of a batch in
    parts, it is not the mean of the parts' losses.

    Differs from the paper, as Mixtral's does, in that f counts all of a token's experts; from
    transformers' in that layers do not make up for each other.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6.
    """
    tokens = jnp.maximum(tokens, 1.0)[:, None]
    per_layer = jnp.sum(counts / tokens * (scores / tokens), axis=-1)
    return counts.shape[-1] * jnp.mean(per_layer)


def router_z_loss(squared_log_z: PerLayer, tokens: PerLayer) -> Float[Array, ""]:
    """Return the mean over tokens and layers of log² Z, Z the sum of the router's exponentials.

    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return jnp.mean(squared_log_z / jnp.maximum(tokens, 1.0))


def largest_expert_share(counts: PerExpert) -> Float[Array, ""]:
    """Return the share of a layer's choices that its busiest expert has, of the worst layer."""
    choices = jnp.maximum(jnp.sum(counts, axis=-1), 1.0)
    return jnp.max(jnp.max(counts, axis=-1) / choices)


def dropped_share(dropped: PerLayer, counts: PerExpert) -> Float[Array, ""]:
    """Return the share of all choices that found no room."""
    return jnp.sum(dropped) / jnp.maximum(jnp.sum(counts), 1.0)
