"""The estimators' expectations against the exact gradient of E[r] − β·KL(π‖π_ref), enumerated.

All responses are listed, each weighted by its probability: what the shipped functions make of them
is the expectation itself. Right ones agree in direction and size; each known mistake fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.objectives.policy_gradient import (
    aggregate,
    clipped_policy_loss,
    kl_k1,
    kl_k2_sequence,
    kl_k3,
    policy_gradient_loss,
)
from llm.rl.advantages import gae, group_advantages, leave_one_out_advantages, token_rewards
from tests.rl.tabular import ALL, probabilities, random_logits, random_rewards
from tests.rl.tabular import token_log_probs as log_probs_of

BETA = 0.3
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def setting():
    return random_logits(0), random_logits(1), random_rewards(2)


def exact_gradient(logits, reference, rewards, temperature=1.0):
    """Return the gradient of the loss −(E[r] − β·KL), by differentiating the enumerated sum."""

    def loss(logits):
        p = probabilities(logits, temperature)
        q = probabilities(reference, temperature)
        return -jnp.sum(p * (rewards - BETA * (jnp.log(p) - jnp.log(q))))

    return jax.grad(loss)(logits)


def relative_error(found, exact):
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def ppo_gradient(
    logits,
    reference,
    rewards,
    *,
    temperature=1.0,
    learnt_temperature=None,
    kl_sign=1.0,
    mode="sequence_sum",
    eos_masked=False,
    values=None,
    loss="clipped",
):
    """Return the expected gradient of the shipped losses, with one mistake where asked."""
    learnt_temperature = learnt_temperature or temperature
    p = probabilities(logits, temperature)
    mask = jnp.asarray(ALL.mask)
    theirs = log_probs_of(reference, learnt_temperature)
    old = log_probs_of(logits, learnt_temperature)
    token_scores = token_rewards(rewards, kl_k1(old, theirs), mask, kl_sign * BETA)
    values = jnp.zeros_like(mask) if values is None else values
    advantages, _ = gae(token_scores, values, mask, gamma=1.0, lam=1.0)
    learnt = mask * (ALL.tokens != 0) if eos_masked else mask

    def expected(logits):
        log_probs = log_probs_of(logits, learnt_temperature)
        if loss == "clipped":
            per_token, _ = clipped_policy_loss(log_probs, old, advantages, learnt)
        else:
            per_token = policy_gradient_loss(log_probs, advantages, learnt)
        if mode == "sequence_mean":
            total = jax.vmap(lambda x, m: aggregate(x[None], m[None], mode)[0])(per_token, learnt)
            return jnp.sum(p * total)
        return aggregate(per_token, learnt * p[:, None], mode)[0]

    return jax.grad(expected)(logits)


@pytest.mark.parametrize("loss", ["clipped", "plain"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_expected_update_is_the_exact_gradient(temperature, loss):
    logits, reference, rewards = setting()
    exact = exact_gradient(logits, reference, rewards, temperature)
    found = ppo_gradient(logits, reference, rewards, temperature=temperature, loss=loss)
    assert relative_error(found, exact) < 1e-10


def test_a_value_baseline_leaves_the_expectation_as_it_is():
    """Any function of the prefix may be taken off, GAE at λ = 1 being returns less values."""
    logits, reference, rewards = setting()
    table = jnp.asarray(np.random.default_rng(5).normal(size=int(ALL.states.max()) + 1))
    values = table[ALL.states] * ALL.mask
    found = ppo_gradient(logits, reference, rewards, values=values)
    assert relative_error(found, exact_gradient(logits, reference, rewards)) < 1e-10


@pytest.mark.parametrize(
    "mistake",
    [
        dict(kl_sign=-1.0),
        dict(mode="sequence_mean"),
        dict(eos_masked=True),
        dict(temperature=0.7, learnt_temperature=1.0),
    ],
    ids=["KL sign", "length mean", "EOS masked", "temperature missing"],
)
def test_known_mistakes_are_not_the_gradient(mistake):
    logits, reference, rewards = setting()
    exact = exact_gradient(logits, reference, rewards, mistake.get("temperature", 1.0))
    assert relative_error(ppo_gradient(logits, reference, rewards, **mistake), exact) > 0.05


def group_gradient(logits, reference, rewards, advantages_of):
    """Return the expected gradient over all pairs of responses, for a group's advantages."""
    p = probabilities(logits)
    mask, theirs, old = jnp.asarray(ALL.mask), log_probs_of(reference), log_probs_of(logits)
    totals = jnp.sum(token_rewards(rewards, kl_k1(old, theirs), mask, BETA), axis=1)
    first, second = (x.ravel() for x in jnp.indices((len(p), len(p))))
    advantages = advantages_of(jnp.stack([totals[first], totals[second]], axis=1))
    weights = p[first] * p[second]
    # Each response's weight as the first of a pair times its advantage there; the second alike.
    each = [
        jnp.zeros_like(p).at[place].add(weights * advantages[:, k]) / 2
        for k, place in enumerate((first, second))
    ]

    def expected(logits):
        per_token = policy_gradient_loss(log_probs_of(logits), sum(each)[:, None] * mask, mask)
        return aggregate(per_token, mask, "sequence_sum")[0]

    return jax.grad(expected)(logits)


def test_leave_one_out_is_exact_and_the_mean_with_itself_is_short_by_one_in_g():
    logits, reference, rewards = setting()
    exact = exact_gradient(logits, reference, rewards)
    rloo = group_gradient(logits, reference, rewards, leave_one_out_advantages)
    assert relative_error(rloo, exact) < 1e-10
    grpo = group_gradient(
        logits, reference, rewards, lambda scores: group_advantages(scores, std=False)
    )
    assert relative_error(grpo, (1 - 1 / 2) * exact) < 1e-10
    assert relative_error(grpo, exact) > 0.4  # so a leave-one-out with itself in it would be found


def test_k2_of_the_sequence_has_the_gradient_of_the_divergence_and_others_have_not():
    logits, reference, _ = setting()
    p, mask = probabilities(logits), jnp.asarray(ALL.mask)
    theirs = log_probs_of(reference)
    exact = exact_gradient(logits, reference, jnp.zeros(len(p))) / BETA

    def expected(per_response):
        return jax.grad(lambda x: jnp.sum(p * per_response(log_probs_of(x))))(logits)

    k2 = expected(lambda log_probs: kl_k2_sequence(log_probs, theirs, mask))
    assert relative_error(k2, exact) < 1e-10
    k1 = expected(lambda log_probs: jnp.sum(kl_k1(log_probs, theirs) * mask, axis=1))
    assert float(jnp.linalg.norm(k1)) < 1e-10  # no effect at all
    k3 = expected(lambda log_probs: jnp.sum(kl_k3(log_probs, theirs) * mask, axis=1))
    assert relative_error(k3, exact) > 0.05
    k2_a_token = expected(
        lambda log_probs: jnp.sum(0.5 * jnp.square(log_probs - theirs) * mask, axis=1)
    )
    assert relative_error(k2_a_token, exact) > 0.05


def test_divergence_estimators_are_unbiased():
    logits, reference, _ = setting()
    p, q = probabilities(logits), probabilities(reference)
    ours, theirs = log_probs_of(logits), log_probs_of(reference)
    exact = float(jnp.sum(p * (jnp.log(p) - jnp.log(q))))
    for estimator in (kl_k1, kl_k3):
        mean = float(jnp.sum(p[:, None] * estimator(ours, theirs) * ALL.mask))
        assert mean == pytest.approx(exact, rel=1e-10)
    assert float(jnp.min(kl_k3(ours, theirs))) >= 0 > float(jnp.min(kl_k1(ours, theirs)))
