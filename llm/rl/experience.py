"""Scored responses made into what updates learn from. Third floor."""

from typing import NamedTuple, no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.objectives.policy_gradient import explained_variance, kl_k1, kl_k3
from llm.rl.advantages import (
    gae,
    group_advantages,
    informative_groups,
    leave_one_out_advantages,
    masked_whiten,
    scale_scores,
    token_rewards,
)
from llm.rl.config import AlgorithmConfig, KLConfig
from llm.rl.kl import update_kl_coefficient
from llm.rl.rollout import Rollout
from llm.rl.state import Controllers

PerToken = Float[Array, "B M"]
Metrics = dict[str, Float[Array, ""]]


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Looks(NamedTuple):
    """What the models say of the responses before anything is learnt from them."""

    log_probs: PerToken
    reference_log_probs: PerToken
    values: PerToken  # before each token; 0 where no value is learnt


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Experience(NamedTuple):
    """What an update reads, a row a response; fixed while the policy changes."""

    rollout: Rollout
    looks: Looks
    advantages: PerToken
    returns: PerToken
    mask: PerToken  # 1 on tokens that are learnt from


def make_experience(
    rollout: Rollout,
    looks: Looks,
    scores: Float[Array, " B"],
    controllers: Controllers,
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    group: int,
) -> tuple[Experience, Controllers, Metrics]:
    """Return experience, the controllers' next state, and metrics `rl/…`.

    Responses to one prompt, `group` of them, stand side by side. Their scores are those of
    `collect`: penalties are taken off.
    """
    mask, num_responses = rollout.mask, rollout.mask.shape[0]
    length = jnp.sum(mask, axis=1)
    metrics = {
        "rl/score": jnp.mean(scores),
        "rl/ended_by_eos": jnp.mean(rollout.finished.astype(jnp.float32)),
        "rl/response_tokens": jnp.mean(length),
        "rl/log_prob_gap": _mean(jnp.abs(looks.log_probs - rollout.sampler_log_probs), mask),
    }
    # Before they are scaled, which could round two scores to one.
    informative = informative_groups(scores.reshape(-1, group))
    scale = controllers.scale
    if algorithm.scale_scores:
        scale, scores = scale_scores(scale, scores)
    k1 = kl_k1(looks.log_probs, looks.reference_log_probs) * mask
    kl_nats = jnp.mean(jnp.sum(k1, axis=1))
    coefficient = controllers.kl_coefficient
    rewards = token_rewards(scores, k1, mask, coefficient if kl.place == "reward" else 0.0)
    totals = jnp.sum(rewards, axis=1)
    baseline = controllers.baseline
    returns = jnp.zeros_like(mask)
    match algorithm.name:
        case "ppo":
            advantages, returns = gae(
                rewards, looks.values, mask, gamma=algorithm.gamma, lam=algorithm.lam
            )
            metrics["rl/explained_variance"] = explained_variance(looks.values, returns, mask)
            metrics["rl/value"] = _mean(looks.values, mask)
        case "rloo":
            advantages = leave_one_out_advantages(totals.reshape(-1, group)).reshape(-1, 1) * mask
        case "grpo":
            grouped = group_advantages(totals.reshape(-1, group), std=algorithm.group_std)
            advantages = grouped.reshape(-1, 1) * mask
        case "reinforce":
            # The average of earlier steps: it depends on none of these responses.
            started = controllers.responses > 0
            advantages = (totals - jnp.where(started, baseline, 0.0))[:, None] * mask
            decay = jnp.where(started, algorithm.baseline_decay, 0.0)
            baseline = decay * baseline + (1.0 - decay) * jnp.mean(totals)
    if algorithm.dynamic_draws is not None:
        metrics["rl/informative_groups"] = jnp.mean(informative.astype(jnp.float32))
        mask = mask * jnp.repeat(informative, group)[:, None]
    if algorithm.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    metrics |= {
        "rl/reward": jnp.mean(totals),
        "rl/kl": kl_nats,
        "rl/kl_k3": jnp.mean(
            jnp.sum(kl_k3(looks.log_probs, looks.reference_log_probs) * rollout.mask, axis=1)
        ),
        "rl/kl_coefficient": coefficient,
    }
    controllers = Controllers(
        kl_coefficient=update_kl_coefficient(coefficient, kl_nats, kl, num_responses),
        scale=scale,
        baseline=baseline,
        responses=controllers.responses + num_responses,
    )
    return Experience(rollout, looks, advantages, returns, mask), controllers, metrics


def _mean(x: PerToken, mask: PerToken) -> Float[Array, ""]:
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
