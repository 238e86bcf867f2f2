"""How much divergence from the reference costs, fixed or steered. Third floor."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.rl.config import KLConfig


def update_kl_coefficient(
    coefficient: Float[Array, ""], kl: Float[Array, ""], config: KLConfig, num_responses: int
) -> Float[Array, ""]:
    """Return the coefficient for the next step, given this step's divergence in nats a response.

    With a target it is multiplied by 1 + clip(kl/target − 1, ±0.2) · responses/horizon; without,
    it stays.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, with K_β = responses/horizon as in
    its code.
    """
    if config.target_nats is None:
        return coefficient
    error = jnp.clip(kl / config.target_nats - 1.0, -0.2, 0.2)
    return coefficient * (1.0 + error * num_responses / config.horizon_responses)


def best_of_n_kl_bound(n: int) -> float:
    """Return log n − (n − 1)/n nats: at least the divergence of the best of n samples.

    It is reached as outcomes grow many and unlikely. Source: Stiennon et al. 2020,
    arXiv:2009.01325, appendix G.3; that it is a bound: Beirami et al. 2024, arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n
