"""What an update of a policy-gradient run minimises. Third floor."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.objectives.policy_gradient import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    kl_k2_sequence,
    kl_k3,
)
from llm.rl.config import AlgorithmConfig, KLConfig
from llm.rl.experience import Experience, Metrics
from llm.rl.forward import Said


def minibatch_loss(
    said: Said,
    part: Experience,
    whole_mask: Float[Array, "N M"],
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    kl_coefficient: Float[Array, ""],
    *,
    is_first: Array | bool,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss and logs of a part of a minibatch, over the whole one's counts: they add up.

    `is_first`: of a step's updates. The policy that it begins with is the old one, so that its
    ratio is exactly 1.
    """
    tokens = jnp.maximum(jnp.sum(whole_mask), 1.0)
    sequences = jnp.maximum(jnp.sum(jnp.max(whole_mask, axis=1)), 1.0)
    # Of the policy's loss and of a divergence beside it: what one costs in the other is β.
    policy_count = tokens if algorithm.aggregation == "token_mean" else sequences
    looks, mask, log_probs = part.looks, part.mask, said.log_probs
    old = jnp.where(is_first, jax.lax.stop_gradient(log_probs), looks.log_probs)
    clips = dict(clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
    per_token, sums = clipped_policy_loss(log_probs, old, part.advantages, mask, **clips)
    logs = {name: total / tokens for name, total in sums.items()}
    logs["learnt_tokens"] = jnp.sum(mask)
    logs["entropy"] = jnp.sum(said.entropies * mask) / tokens
    logs["policy_loss"] = aggregate(per_token, mask, algorithm.aggregation)[0] / policy_count
    loss = logs["policy_loss"]
    if algorithm.entropy_weight:  # or its gradient is worked out to be multiplied by 0
        loss -= algorithm.entropy_weight * logs["entropy"]
    if kl.place == "loss_k2":
        k2 = kl_k2_sequence(log_probs, looks.reference_log_probs, mask)
        loss += kl_coefficient * jnp.sum(k2 * jnp.max(mask, axis=1)) / policy_count
    if kl.place == "loss_k3":
        k3 = kl_k3(log_probs, looks.reference_log_probs)
        loss += kl_coefficient * aggregate(k3, mask, algorithm.aggregation)[0] / policy_count
    if algorithm.name == "ppo":
        per_token, value_sums = clipped_value_loss(
            said.values, looks.values, part.returns, mask, clip=algorithm.value_clip
        )
        logs |= {name: total / tokens for name, total in value_sums.items()}
        logs["value_loss"] = jnp.sum(per_token * mask) / tokens
        loss += algorithm.value_weight * logs["value_loss"]
    return loss, logs
