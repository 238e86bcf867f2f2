"""Losses on preferences: Bradley–Terry for scores, and direct optimisation of a policy's
log-probabilities. First floor: pure functions.

Each returns a loss a prompt or a pair, for the caller to sum and divide once, and sums to report.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Sums = dict[str, Float[Array, ""]]
Pairs = Float[Array, " P"]  # one number a pair: log-probabilities summed over the response, nats


def pairs_of(
    levels: Float[Array, "G K"], present: Bool[Array, "G K"]
) -> tuple[Bool[Array, "G K K"], Bool[Array, "G K K"]]:
    """Return which response i beats which j of the same prompt, and which pairs i < j tie.

    `levels` are higher for better responses; absent ones are in no pair.
    """
    both = present[:, :, None] & present[:, None, :]
    better = levels[:, :, None] > levels[:, None, :]
    upper = jnp.arange(levels.shape[1])[:, None] < jnp.arange(levels.shape[1])
    ties = both & (levels[:, :, None] == levels[:, None, :]) & upper
    return both & better, ties


def bradley_terry_loss(
    scores: Float[Array, "G K"],
    levels: Float[Array, "G K"],
    present: Bool[Array, "G K"],
    margins: Float[Array, " G"],
    *,
    tie_threshold: float = 0.0,
) -> tuple[Float[Array, " G"], Sums]:
    """Return each prompt's mean loss over all its pairs, and sums: prompts, pairs, correct.

    Scores must differ by `margins` for a pair to cost log 2 (Llama 2). With a `tie_threshold` η of
    nats, ties cost their own probability and a win must exceed it; with 0 ties are left out. A
    prompt without pairs costs 0 and does not count. `correct` counts a pair whose scores are equal
    by half.

    Source: all K-choose-2 pairs of a prompt at equal weight, Ouyang et al. 2022, arXiv:2203.02155,
    eq. 1; margins, Touvron et al. 2023, arXiv:2307.09288, eq. 2; ties, Rao & Kupper 1967, whose
    θ is exp(η).
    """
    wins, ties = pairs_of(levels, present)
    difference = scores[:, :, None] - scores[:, None, :]
    won = -jax.nn.log_sigmoid(difference - margins[:, None, None] - tie_threshold)
    loss = jnp.sum(jnp.where(wins, won, 0.0), axis=(1, 2))
    count = jnp.sum(wins, axis=(1, 2))
    if tie_threshold:
        # P(tie) = 1 − P(i wins) − P(j wins) = (θ² − 1) σ(d − η) σ(−d − η)
        tied = (
            -jax.nn.log_sigmoid(difference - tie_threshold)
            - jax.nn.log_sigmoid(-difference - tie_threshold)
            - jnp.log(jnp.expm1(2.0 * tie_threshold))
        )
        loss += jnp.sum(jnp.where(ties, tied, 0.0), axis=(1, 2))
        count += jnp.sum(ties, axis=(1, 2))
    right = jnp.where(difference > 0, 1.0, jnp.where(difference == 0, 0.5, 0.0))
    sums = {
        "prompts": jnp.sum(count > 0).astype(scores.dtype),
        "pairs": jnp.sum(wins).astype(scores.dtype),
        "correct": jnp.sum(jnp.where(wins, right, 0.0)),
    }
    return loss / jnp.maximum(count, 1), jax.lax.stop_gradient(sums)


def dpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Pairs:
    """Return direct preference optimisation's loss a pair; log 2 where policy is reference.

    With label smoothing ε, labels are taken to be wrong that often (conservative DPO).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing, Mitchell 2023.
    """
    logits = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    kept = (1.0 - label_smoothing) * jax.nn.log_sigmoid(logits)
    return -kept - label_smoothing * jax.nn.log_sigmoid(-logits)


def ipo_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    *,
    beta: float,
) -> Pairs:
    """Return (h − 1/(2β))², h the difference of log-ratios: it does not run away to infinity.

    Log-probabilities are summed over tokens as in the paper; TRL takes their mean.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    h = (chosen - reference_chosen) - (rejected - reference_rejected)
    return jnp.square(h - 0.5 / beta)


def kto_loss(
    log_probs: Pairs,
    reference_log_probs: Pairs,
    desirable: Bool[Array, " P"],
    present: Bool[Array, " P"],
    mismatched_kl: Float[Array, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Pairs:
    """Return Kahneman–Tversky optimisation's loss a response, of thumbs up and down; 0 if absent.

    `mismatched_kl` is the mean log-ratio of responses to prompts that are not theirs: it estimates
    the divergence, is clipped at 0, and carries no gradient.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8.
    """
    reference_point = jax.lax.stop_gradient(jnp.maximum(mismatched_kl, 0.0))
    reward = log_probs - reference_log_probs
    up = desirable_weight * (1.0 - jax.nn.sigmoid(beta * (reward - reference_point)))
    down = undesirable_weight * (1.0 - jax.nn.sigmoid(beta * (reference_point - reward)))
    return jnp.where(present, jnp.where(desirable, up, down), 0.0)


def orpo_loss(
    chosen: Pairs, rejected: Pairs, chosen_tokens: Pairs, rejected_tokens: Pairs, *, beta: float
) -> Pairs:
    """Return odds-ratio preference optimisation's loss a pair: no reference is needed.

    The chosen response's nats a token, plus β times −log σ of the log odds ratio, the odds being of
    the geometric mean of a token's probability.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    good, bad = chosen / chosen_tokens, rejected / rejected_tokens
    log_odds = (good - bad) - (_log1mexp(good) - _log1mexp(bad))
    return -good - beta * jax.nn.log_sigmoid(log_odds)


def simpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    chosen_tokens: Pairs,
    rejected_tokens: Pairs,
    *,
    beta: float,
    margin: float,
) -> Pairs:
    """Return SimPO's loss a pair: mean log-probabilities must differ by a margin; no reference.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6, whose γ is `margin`.
    """
    difference = chosen / chosen_tokens - rejected / rejected_tokens
    return -jax.nn.log_sigmoid(beta * difference - margin)


def _log1mexp(x: Pairs) -> Pairs:
    """Return log(1 − exp(x)) for x < 0, exact near 0 and far from it."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    # Both branches see values that they can take: a NaN of the other would spoil the gradient.
    by_expm1 = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, by_expm1, by_log1p)
