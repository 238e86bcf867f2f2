"""A minibatch's loss and its gradients against TRL's formulas in torch, in float64.

GRPO, its token means ("dapo") and clip-higher as in TRL 1.16; PPO's value loss, advantages and
whitening as in its PPO trainer, up to the variance: ours divides by n and not by n − 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm.rl.advantages import gae, group_advantages, leave_one_out_advantages, masked_whiten
from llm.rl.config import AlgorithmConfig, KLConfig
from llm.rl.experience import Experience, Looks
from llm.rl.forward import Said
from llm.rl.loss import minibatch_loss

RNG = np.random.default_rng(0)
GROUPS, GROUP, LENGTH = 3, 4, 6
SHAPE = GROUPS * GROUP, LENGTH
LENGTHS = RNG.integers(1, LENGTH + 1, SHAPE[0])
MASK = (np.arange(LENGTH) < LENGTHS[:, None]).astype(np.float64)
OLD = -RNG.uniform(0.1, 4, SHAPE)
NEW = OLD + RNG.normal(0, 0.3, SHAPE)  # so that some ratios are clipped, on both sides
REFERENCE = OLD + RNG.normal(0, 0.3, SHAPE)
SCORES = RNG.normal(0, 1, (GROUPS, GROUP))
ADVANTAGES = RNG.normal(0, 1, SHAPE)
OLD_VALUES, RETURNS = RNG.normal(0, 1, SHAPE), RNG.normal(0, 1, SHAPE)
VALUES = OLD_VALUES + RNG.normal(0, 0.3, SHAPE)
BETA = 0.07


def ours(algorithm, kl, advantages):
    """Return the loss, and its gradient by log-probabilities and values."""
    looks = Looks(*map(jnp.asarray, (OLD, REFERENCE, OLD_VALUES)))
    part = Experience(None, looks, advantages, jnp.asarray(RETURNS), jnp.asarray(MASK))

    def loss(log_probs, values):
        said = Said(log_probs, jnp.zeros(SHAPE), values)
        beta = jnp.asarray(kl.coefficient)
        found = minibatch_loss(said, part, part.mask, algorithm, kl, beta, is_first=False)
        return found[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(NEW), jnp.asarray(VALUES))


def same(found, expected, *inputs):
    expected.backward()
    np.testing.assert_allclose(found[0], expected.detach().numpy(), rtol=1e-10)
    for gradient, tensor in zip(found[1], inputs, strict=False):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_grpo(aggregation, clip_high, std):
    mask, old, reference = map(torch.tensor, (MASK, OLD, REFERENCE))
    new = torch.tensor(NEW, requires_grad=True)
    scores = torch.tensor(SCORES)
    advantages = scores - scores.mean(1, keepdim=True)
    if std:
        advantages = advantages / (scores.std(1, keepdim=True) + 1e-4)
    advantages = advantages.reshape(-1, 1)
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + clip_high)
    assert (ratio[mask > 0] != clipped[mask > 0]).sum() > 5
    kl = torch.exp(reference - new) - (reference - new) - 1
    per_token = -torch.min(ratio * advantages, clipped * advantages) + BETA * kl
    if aggregation == "sequence_mean":
        expected = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    else:
        expected = (per_token * mask).sum() / mask.sum()
    with jax.enable_x64(True):
        algorithm = AlgorithmConfig(
            name="grpo", aggregation=aggregation, clip_high=clip_high, group_std=std
        )
        taken = group_advantages(jnp.asarray(SCORES), std=std).reshape(-1, 1) * MASK
        found = ours(algorithm, KLConfig(BETA, place="loss_k3"), taken)
        same(found, expected, new)


def test_ppo_with_a_clipped_value():
    mask, old, advantages = map(torch.tensor, (MASK, OLD, ADVANTAGES))
    old_values, returns = torch.tensor(OLD_VALUES), torch.tensor(RETURNS)
    new, values = (torch.tensor(x, requires_grad=True) for x in (NEW, VALUES))
    ratio = torch.exp(new - old)
    policy = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2))
    near = torch.clamp(values, old_values - 0.25, old_values + 0.25)
    assert (near != values).sum() > 5
    value = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
    expected = ((policy + 0.3 * value) * mask).sum() / mask.sum()
    with jax.enable_x64(True):
        algorithm = AlgorithmConfig(name="ppo", value_clip=0.25, value_weight=0.3)
        found = ours(algorithm, KLConfig(BETA), jnp.asarray(ADVANTAGES * MASK))
        same(found, expected, new, values)


def test_advantages():
    rewards = torch.tensor(RNG.normal(0, 1, SHAPE) * MASK)
    values = torch.tensor(OLD_VALUES * MASK)
    last, reversed_advantages = torch.zeros(SHAPE[0], dtype=torch.float64), []
    for t in reversed(range(LENGTH)):
        next_values = values[:, t + 1] if t < LENGTH - 1 else 0.0
        delta = rewards[:, t] + 0.98 * next_values - values[:, t]
        last = delta + 0.98 * 0.9 * last
        reversed_advantages.append(last)
    expected = torch.stack(reversed_advantages[::-1], axis=1)
    mask = torch.tensor(MASK)
    scores = torch.tensor(SCORES)
    leave_one_out = scores - (scores.sum(1, keepdim=True) - scores) / (GROUP - 1)
    real = expected[mask > 0]
    whitened = (real - real.mean()) * torch.rsqrt(real.var(unbiased=False) + 1e-8)
    with jax.enable_x64(True):
        inputs = (jnp.asarray(x) for x in (rewards.numpy(), OLD_VALUES, MASK))
        advantages, returns = gae(*inputs, gamma=0.98, lam=0.9)
        np.testing.assert_allclose(advantages, expected * mask, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(returns, (expected + values) * mask, rtol=1e-10, atol=1e-13)
        found = leave_one_out_advantages(jnp.asarray(SCORES))
        np.testing.assert_allclose(found, leave_one_out.numpy(), rtol=1e-12, atol=1e-14)
        found = np.asarray(masked_whiten(advantages, jnp.asarray(MASK)))
        np.testing.assert_allclose(found[MASK > 0], whitened.numpy(), rtol=1e-9, atol=1e-12)
