"""Each algorithm, through the shipped losses, reaches the policy that is known to be best.

All responses are listed and weighted by their probabilities: what is optimised is the expectation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.objectives.policy_gradient import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    kl_k1,
    kl_k2_sequence,
    kl_k3,
    policy_gradient_loss,
)
from llm.objectives.preference import dpo_loss
from llm.rl.advantages import gae, group_advantages, leave_one_out_advantages, token_rewards
from tests.rl.tabular import (
    ALL,
    NUM_STATES,
    divergence,
    optimum,
    probabilities,
    random_logits,
    random_rewards,
)
from tests.rl.tabular import token_log_probs as log_probs_of

BETA = 0.5
MASK = jnp.asarray(ALL.mask)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def minimise(loss, params, steps=1500, rate=0.05):
    """Return the parameters after so many steps of Adam with a rate that falls to zero."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(params)


def setting():
    reference = random_logits(1, 0.7)
    return reference, random_rewards(2)


def rewards_of(log_probs, reference, scores):
    """Return the shipped reward a token: −β·k1, and the score at the end."""
    return token_rewards(scores, kl_k1(log_probs, log_probs_of(reference)), MASK, BETA)


def weighted(per_token, probs):
    """Return the expectation of a loss a token, summed over each response."""
    return aggregate(per_token, MASK * jax.lax.stop_gradient(probs)[:, None], "sequence_sum")[0]


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_ppo_reaches_the_optimum_and_its_value_is_the_log_normaliser(lam):
    reference, scores = setting()

    def loss(params):
        logits, table = params
        log_probs, probs = log_probs_of(logits), probabilities(logits)
        old = jax.lax.stop_gradient(log_probs)
        values = table[ALL.states] * MASK
        rewards = rewards_of(old, reference, scores)
        held = jax.lax.stop_gradient(values)
        advantages, returns = gae(rewards, held, MASK, gamma=1.0, lam=lam)
        policy, _ = clipped_policy_loss(log_probs, old, advantages, MASK)
        value, _ = clipped_value_loss(values, held, returns, MASK, clip=0.2)
        return weighted(policy, probs) + weighted(value, probs)

    logits, table = minimise(loss, (reference, jnp.zeros(NUM_STATES)), steps=3000)
    best, log_z = optimum(probabilities(reference), scores, BETA)
    assert divergence(probabilities(logits), best) < 1e-3
    assert float(table[0]) == pytest.approx(float(BETA * log_z), rel=1e-2)
    assert divergence(probabilities(reference), best) > 0.3  # it was not there from the start


def test_reinforce_with_a_baseline_reaches_the_optimum():
    reference, scores = setting()

    def loss(logits):
        log_probs, probs = log_probs_of(logits), probabilities(logits)
        totals = jnp.sum(rewards_of(log_probs, reference, scores), axis=1)
        baseline = jnp.sum(probs * totals)
        advantages = jax.lax.stop_gradient(totals - baseline)[:, None] * MASK
        return weighted(policy_gradient_loss(log_probs, advantages, MASK), probs)

    best, _ = optimum(probabilities(reference), scores, BETA)
    assert divergence(probabilities(minimise(loss, reference)), best) < 1e-3


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_group_baselines_reach_the_optimum(name):
    """Over all pairs of responses to the prompt; GRPO without the deviation."""
    reference, scores = setting()
    first, second = (x.ravel() for x in np.indices((len(scores), len(scores))))

    def loss(logits):
        log_probs, probs = log_probs_of(logits), probabilities(logits)
        totals = jnp.sum(rewards_of(log_probs, reference, scores), axis=1)
        groups = jnp.stack([totals[first], totals[second]], axis=1)
        if name == "rloo":
            advantages = leave_one_out_advantages(groups)
        else:
            advantages = group_advantages(groups, std=False)
        weights = jax.lax.stop_gradient(probs[first] * probs[second])
        advantages = jax.lax.stop_gradient(advantages)
        each = sum(
            jnp.zeros_like(probs).at[place].add(weights * advantages[:, k]) / 2
            for k, place in enumerate((first, second))
        )
        per_token = policy_gradient_loss(log_probs, each[:, None] * MASK, MASK)
        return aggregate(per_token, MASK, "sequence_sum")[0]

    best, _ = optimum(probabilities(reference), scores, BETA)
    assert divergence(probabilities(minimise(loss, reference)), best) < 1e-3


def in_the_loss(penalty, reference, scores):
    """Return the policy that is learnt with the divergence in the loss, not in the reward."""

    def loss(logits):
        log_probs, probs = log_probs_of(logits), probabilities(logits)
        advantages = jnp.broadcast_to(scores[:, None] - jnp.sum(probs * scores), MASK.shape)
        policy = policy_gradient_loss(log_probs, jax.lax.stop_gradient(advantages), MASK)
        return weighted(policy, probs) + BETA * penalty(log_probs, jax.lax.stop_gradient(probs))

    return probabilities(minimise(loss, reference, steps=4000))


def test_k2_of_the_sequence_in_the_loss_reaches_the_optimum():
    reference, scores = setting()
    theirs = log_probs_of(reference)
    learnt = in_the_loss(
        lambda log_probs, probs: jnp.sum(probs * kl_k2_sequence(log_probs, theirs, MASK)),
        reference,
        scores,
    )
    best, _ = optimum(probabilities(reference), scores, BETA)
    assert divergence(learnt, best) < 1e-3


def test_k3_in_the_loss_reaches_its_own_fixed_point_instead():
    """Responses of one token, where k3 of the token is that of the sequence.

    Its gradient on samples of π is that of −Σ π_ref log π: minimising −E[r] + β·(cross-entropy)
    over the simplex gives π = β·π_ref/(λ − r), with λ such that it sums to 1.
    """
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.normal(0, 1, 6))
    reference = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 0.7, 6)))

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits)
        probs = jax.lax.stop_gradient(jnp.exp(log_probs))[:, None]
        one = jnp.ones((6, 1))
        advantages = scores[:, None] - jnp.sum(probs[:, 0] * scores)
        policy = policy_gradient_loss(log_probs[:, None], advantages, one)
        k3 = kl_k3(log_probs[:, None], reference[:, None])
        return aggregate(policy + BETA * k3, one * probs, "sequence_sum")[0]

    learnt = jax.nn.softmax(minimise(loss, reference, steps=4000))
    low, high = float(scores.max()) + 1e-9, float(scores.max()) + 100.0
    for _ in range(200):  # Σ β·π_ref/(λ − r) falls with λ
        middle = (low + high) / 2
        total = float(jnp.sum(BETA * jnp.exp(reference) / (middle - scores)))
        low, high = (middle, high) if total > 1 else (low, middle)
    fixed_point = BETA * jnp.exp(reference) / (low - scores)
    best, _ = optimum(jnp.exp(reference), scores, BETA)
    assert divergence(learnt, fixed_point) < 1e-6
    assert divergence(learnt, best) > 1e-2


def test_dpo_on_all_pairs_reaches_the_optimum():
    """The population: every pair, preferred as often as Bradley–Terry has it at these scores."""
    reference, scores = setting()
    first, second = (x.ravel() for x in np.indices((len(scores), len(scores))))
    wins = jax.nn.sigmoid(scores[first] - scores[second])
    base = probabilities(reference)
    weights = base[first] * base[second] * wins

    def loss(logits):
        ours = jnp.sum(log_probs_of(logits), axis=1)
        theirs = jnp.sum(log_probs_of(reference), axis=1)
        losses = dpo_loss(ours[first], ours[second], theirs[first], theirs[second], beta=BETA)
        return jnp.sum(weights * losses)

    best, _ = optimum(base, scores, BETA)
    assert divergence(probabilities(minimise(loss, reference)), best) < 1e-3
