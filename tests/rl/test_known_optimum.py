"""Each algorithm, through its shipped loss, reaches the policy that is known to be best.

All responses are listed and weighted by their probabilities: what is optimised is the expectation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.objectives.preference import dpo_loss
from llm.rl.config import AlgorithmConfig, KLConfig
from llm.rl.forward import Said
from tests.rl.enumeration import expected_loss
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


def learnt_policy(algorithm, kl, *, value=False, steps=1500):
    """Return logits, and a value a state where one is learnt, that minimise the shipped loss."""
    reference, scores = setting()
    theirs = log_probs_of(reference)

    def loss(params):
        logits, table = params
        ours = log_probs_of(logits)
        values = table[ALL.states] * MASK if value else jnp.zeros_like(MASK)
        said = Said(ours, jnp.zeros_like(ours), values)
        return expected_loss(said, theirs, scores, probabilities(logits), algorithm, kl)

    return minimise(loss, (reference, jnp.zeros(NUM_STATES)), steps)


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_ppo_reaches_the_optimum_and_its_value_is_the_log_normaliser(lam):
    reference, scores = setting()
    algorithm = AlgorithmConfig(name="ppo", lam=lam, aggregation="sequence_sum")
    logits, table = learnt_policy(algorithm, KLConfig(BETA), value=True, steps=3000)
    best, log_z = optimum(probabilities(reference), scores, BETA)
    assert divergence(probabilities(logits), best) < 1e-3
    assert float(table[0]) == pytest.approx(float(BETA * log_z), rel=1e-2)
    assert divergence(probabilities(reference), best) > 0.3  # it was not there from the start


@pytest.mark.parametrize(
    "name, place",
    [
        ("reinforce", "reward"),
        ("rloo", "reward"),
        ("grpo", "reward"),
        ("reinforce", "loss_k2"),
        ("rloo", "loss_k2"),
    ],
)
def test_others_reach_the_optimum(name, place):
    """Groups are all pairs of responses to the prompt; GRPO is without the deviation."""
    reference, scores = setting()
    algorithm = AlgorithmConfig(name=name, aggregation="sequence_sum")
    steps = 1500 if place == "reward" else 4000
    logits, _ = learnt_policy(algorithm, KLConfig(BETA, place), steps=steps)
    best, _ = optimum(probabilities(reference), scores, BETA)
    assert divergence(probabilities(logits), best) < 1e-3


def test_k3_in_the_loss_reaches_its_own_fixed_point_instead():
    """Responses of one token, where k3 of the token is that of the sequence.

    Its gradient on samples of π is that of −Σ π_ref log π: minimising −E[r] + β·(cross-entropy)
    over the simplex gives π = β·π_ref/(λ − r), with λ such that it sums to 1.
    """
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.normal(0, 1, 6))
    reference = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 0.7, 6)))
    algorithm = AlgorithmConfig(name="reinforce", aggregation="sequence_sum")
    one = jnp.ones((6, 1))

    def loss(logits):
        ours = jax.nn.log_softmax(logits)
        said = Said(ours[:, None], 0 * one, 0 * one)
        kl = KLConfig(BETA, "loss_k3")
        return expected_loss(
            said, reference[:, None], scores, jnp.exp(ours), algorithm, kl, mask=one
        )

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
