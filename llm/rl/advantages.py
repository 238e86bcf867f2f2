"""From rewards to advantages. Third floor: pure functions of arrays.

Responses are rows padded on the right; masks are 1 on their tokens, EOS included.
"""

from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PerToken = Float[Array, "B T"]
Groups = Float[Array, "P G"]  # scores of G responses to each of P prompts


def token_rewards(
    scores: Float[Array, " B"], kl: PerToken, mask: PerToken, coefficient: Float[Array, ""] | float
) -> PerToken:
    """Return −coefficient · kl at each token of a response, and its score at the last.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2; a token at a time as in its code.
    """
    last = mask * (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    return last * scores[:, None] - coefficient * jnp.where(mask > 0, kl, 0.0)


def gae(
    rewards: PerToken, values: PerToken, mask: PerToken, *, gamma: float, lam: float
) -> tuple[PerToken, PerToken]:
    """Return (advantages, returns). After a response's last token the value is 0.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; returns are advantages + values.
    """
    next_values = jnp.pad(values * mask, ((0, 0), (0, 1)))[:, 1:]
    errors = (rewards + gamma * next_values - values) * mask

    def back(advantage, column):
        error, present = column
        advantage = (error + gamma * lam * advantage) * present
        return advantage, advantage

    start = jnp.zeros(rewards.shape[0], errors.dtype)
    _, columns = jax.lax.scan(back, start, (errors.T, mask.T), reverse=True)
    advantages = columns.T
    return advantages, (advantages + values) * mask


def group_advantages(scores: Groups, *, std: bool, epsilon: float = 1e-4) -> Groups:
    """Return scores less their group's mean, itself included; with `std`, over its deviation.

    Where all scores of a group are equal, exactly 0. The mean that includes the response shrinks
    the expected gradient by 1 − 1/G.

    Source: GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2, with std (of the sample, G − 1,
    as in TRL); without it, Liu et al. 2025, arXiv:2503.20783.
    """
    centred = jnp.where(_equal(scores), 0.0, scores - jnp.mean(scores, axis=1, keepdims=True))
    if not std:
        return centred
    return centred / (jnp.std(scores, axis=1, keepdims=True, ddof=1) + epsilon)


def leave_one_out_advantages(scores: Groups) -> Groups:
    """Return scores less the mean of the other responses' in the group: an unbiased baseline.

    Source: RLOO, Ahmadian et al. 2024, arXiv:2402.14740, section 3.2; Kool et al. 2019.
    """
    size = scores.shape[1]
    others = (jnp.sum(scores, axis=1, keepdims=True) - scores) / (size - 1)
    return jnp.where(_equal(scores), 0.0, scores - others)


def informative_groups(scores: Groups) -> Bool[Array, " P"]:
    """Return whether a group's scores differ: only then does it teach anything.

    Source: dynamic sampling of DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2.
    """
    return ~_equal(scores)[:, 0]


def overlong_penalty(
    lengths: Int[Array, " B"], *, max_length_tokens: int, buffer_tokens: int
) -> Float[Array, " B"]:
    """Return 0 up to max_length − buffer, falling to −1 at max_length and −1 beyond.

    Source: soft overlong punishment of DAPO, arXiv:2503.14476, eq. 13.
    """
    excess = lengths - (max_length_tokens - buffer_tokens)
    return -jnp.clip(excess / buffer_tokens, 0.0, 1.0)


def response_penalties(
    lengths: Int[Array, " B"],
    finished: Bool[Array, " B"],
    *,
    max_length_tokens: int,
    missing_eos: float,
    overlong_buffer_tokens: int,
) -> Float[Array, " B"]:
    """Return what is taken off each response's score: for not ending by itself, or for its length.

    The larger of the two: a response that is cut at the limit is not punished twice for it.
    """
    penalties = jnp.where(finished, 0.0, missing_eos)
    if not overlong_buffer_tokens:
        return penalties
    overlong = overlong_penalty(
        lengths, max_length_tokens=max_length_tokens, buffer_tokens=overlong_buffer_tokens
    )
    return jnp.maximum(penalties, -overlong)


def masked_whiten(x: PerToken, mask: PerToken, *, epsilon: float = 1e-8) -> PerToken:
    """Return x with mean 0 and variance 1 over unmasked entries; 0 elsewhere."""
    count = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(x * mask) / count
    variance = jnp.sum(jnp.square(x - mean) * mask) / count
    return jnp.where(mask > 0, (x - mean) * jax.lax.rsqrt(variance + epsilon), 0.0)


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class RunningScale(NamedTuple):
    """Statistics of all scores seen: count, mean and summed squares about it."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]


def init_running_scale() -> RunningScale:
    return RunningScale(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def scale_scores(
    state: RunningScale, scores: Float[Array, " B"], *, epsilon: float = 1e-6
) -> tuple[RunningScale, Float[Array, " B"]]:
    """Return statistics with these scores, and the scores over their running deviation.

    The mean is not taken away: it would change which responses are worth their divergence from the
    reference, and what an end without EOS costs. Where all scores so far are one, they stay.

    Source: Engstrom et al. 2020, arXiv:2005.12729; merging as Chan et al. 1979.
    """
    count, mean = scores.shape[0], jnp.mean(scores)
    squares = jnp.sum(jnp.square(scores - mean))
    total = state.count + count
    delta = mean - state.mean
    merged = RunningScale(
        total,
        state.mean + delta * count / total,
        state.squares + squares + jnp.square(delta) * state.count * count / total,
    )
    deviation = jnp.sqrt(merged.squares / total)
    return merged, scores / jnp.where(deviation > epsilon, deviation, 1.0)


def _equal(scores: Groups) -> Bool[Array, "P 1"]:
    return jnp.all(scores == scores[:, :1], axis=1, keepdims=True)
