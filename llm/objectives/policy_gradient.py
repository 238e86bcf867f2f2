"""Policy-gradient losses over sampled responses, a number a token. First floor: pure functions.

Log-probabilities are in nats. Masks are 1 on response tokens, EOS included, and 0 on prompt and
padding; being floats, they may also weigh sequences.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PerToken = Float[Array, "B T"]
Sums = dict[str, Float[Array, ""]]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


def aggregate(
    per_token: PerToken, mask: PerToken, mode: Aggregation
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (sum, count), whose quotient is the loss.

    "sequence_sum": tokens are summed and sequences averaged: the gradient of the expected reward.
    "token_mean": every token counts alike (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8).
    "sequence_mean": each sequence's mean over its own length (GRPO, Shao et al. 2024,
    arXiv:2402.03300, eq. 3), which favours short right answers and long wrong ones (Liu et al.
    2025, arXiv:2503.20783).
    """
    total = jnp.sum(per_token * mask, axis=1)
    match mode:
        case "token_mean":
            return jnp.sum(total), jnp.sum(mask)
        case "sequence_mean":
            tokens = jnp.sum(mask > 0, axis=1)  # not the mask's sum, which would undo its weights
            return jnp.sum(total / jnp.maximum(tokens, 1)), _present(mask)
        case "sequence_sum":
            return jnp.sum(total), _present(mask)


def clipped_policy_loss(
    log_probs: PerToken,
    old_log_probs: PerToken,
    advantages: PerToken,
    mask: PerToken,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[PerToken, Sums]:
    """Return PPO's clipped surrogate loss a token, and sums over unmasked tokens.

    The ratio is clipped to [1 − clip_low, 1 + clip_high]. Sums: `clip_fraction` (tokens whose clip
    binds), `ratio`, `approx_kl` (k3 of the old policy to the new).

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; a wider clip above than below is DAPO,
    arXiv:2503.14476, eq. 10.
    """
    difference = jnp.where(mask > 0, log_probs - old_log_probs, 0.0)
    ratio = jnp.exp(difference)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    binds = clipped * advantages < ratio * advantages
    sums = {
        "clip_fraction": jnp.sum(mask * binds),
        "ratio": jnp.sum(mask * ratio),
        "approx_kl": jnp.sum(mask * (ratio - 1.0 - difference)),
    }
    return jnp.where(mask > 0, loss, 0.0), jax.lax.stop_gradient(sums)


def clipped_value_loss(
    values: PerToken, old_values: PerToken, returns: PerToken, mask: PerToken, *, clip: float | None
) -> tuple[PerToken, Sums]:
    """Return half the squared error a token, the larger of the plain and the clipped value's.

    Without `clip` it is the plain one. Sums: `value_clip_fraction`.

    Source: the clip is of OpenAI's PPO code ("PPO2"); Engstrom et al. 2020, arXiv:2005.12729.
    """
    plain = jnp.square(values - returns)
    if clip is None:
        loss, binds = plain, jnp.zeros_like(plain)
    else:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        clipped = jnp.square(near - returns)
        loss, binds = jnp.maximum(plain, clipped), clipped > plain
    sums = {"value_clip_fraction": jnp.sum(mask * binds)}
    return jnp.where(mask > 0, 0.5 * loss, 0.0), jax.lax.stop_gradient(sums)


def kl_k1(log_probs: PerToken, reference_log_probs: PerToken) -> PerToken:
    """Return log π − log π_ref of each sampled token: unbiased, and negative at times."""
    return log_probs - reference_log_probs


def kl_k3(log_probs: PerToken, reference_log_probs: PerToken) -> PerToken:
    """Return r − 1 − log r with r = π_ref/π, of each sampled token: unbiased and never negative.

    For logs. As a term of the loss (GRPO, arXiv:2402.03300, eq. 4) its gradient is not that of the
    divergence: the optimum is π = β·π_ref/(λ − reward) instead of π ∝ π_ref·exp(reward/β).

    Source: Schulman 2020, "Approximating KL divergence".
    """
    difference = reference_log_probs - log_probs
    return jnp.expm1(difference) - difference


def kl_k2_sequence(
    log_probs: PerToken, reference_log_probs: PerToken, mask: PerToken
) -> Float[Array, " B"]:
    """Return ½ (log π(response) − log π_ref(response))² of each response, for use in the loss.

    On samples of π its gradient is an unbiased estimate of the gradient of KL(π‖π_ref): that of a
    sequence, not of its tokens, whose k2 would leave out what a token does to the later ones.
    """
    difference = jnp.where(mask > 0, log_probs - reference_log_probs, 0.0)
    return 0.5 * jnp.square(jnp.sum(difference, axis=1))


def explained_variance(values: PerToken, returns: PerToken, mask: PerToken) -> Float[Array, ""]:
    """Return 1 − Var(returns − values)/Var(returns) over unmasked tokens; 0 where returns are one.

    1: the values are right; 0: no better than a constant; below: worse.
    """
    variance = _variance(returns, mask)
    unexplained = _variance(returns - values, mask)
    return jnp.where(variance > 0, 1.0 - unexplained / jnp.where(variance > 0, variance, 1.0), 0.0)


def _variance(x: PerToken, mask: PerToken) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(x * mask) / count
    return jnp.sum(jnp.square(x - mean) * mask) / count


def _present(mask: PerToken) -> Float[Array, ""]:
    """Return how many sequences have tokens, each with its weight."""
    return jnp.sum(jnp.max(mask, axis=1))
