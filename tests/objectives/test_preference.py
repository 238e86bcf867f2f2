"""Preference losses against their papers' equations in NumPy, torch's autograd and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm.objectives.preference import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pairs_of,
    simpo_loss,
)

RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (-RNG.uniform(5, 60, 12) for _ in range(4))
TOKENS = RNG.integers(4, 20, (2, 12)).astype(np.float64)
BETA = 0.2


def check(ours, theirs, *inputs):
    """Compare values and gradients, all in float64."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in inputs]
        values = ours(*arrays)
        gradients = jax.grad(lambda a: jnp.sum(ours(*a)))(arrays)
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    expected = theirs(*tensors)
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-9, atol=1e-12)
    for found, tensor in zip(gradients, tensors, strict=True):
        wanted = np.zeros(found.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(smoothing):
    def theirs(c, r, rc, rr):
        logits = BETA * ((c - r) - (rc - rr))
        return -F.logsigmoid(logits) * (1 - smoothing) - F.logsigmoid(-logits) * smoothing

    check(
        lambda *x: dpo_loss(*x, beta=BETA, label_smoothing=smoothing),
        theirs,
        CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED,
    )  # fmt: skip
    first = dpo_loss(*map(jnp.asarray, (CHOSEN, REJECTED, CHOSEN, REJECTED)), beta=BETA)
    np.testing.assert_allclose(first, np.log(2.0), rtol=1e-6)


def test_ipo():
    check(
        lambda *x: ipo_loss(*x, beta=BETA),
        lambda c, r, rc, rr: ((c - r) - (rc - rr) - 1 / (2 * BETA)) ** 2,
        CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED,
    )  # fmt: skip


@pytest.mark.parametrize("kl", [1.7, -3.0])
def test_kto(kl):
    good = np.arange(12) % 3 == 0
    present = np.arange(12) != 5

    def theirs(ours, reference):
        z = max(kl, 0.0)
        reward = ours - reference
        up = 2.0 * (1 - torch.sigmoid(BETA * (reward - z)))
        down = 1 - torch.sigmoid(BETA * (z - reward))
        return torch.where(torch.tensor(present), torch.where(torch.tensor(good), up, down), 0.0)

    check(
        lambda ours, reference: kto_loss(
            ours, reference, jnp.asarray(good), jnp.asarray(present), jnp.float64(kl),
            beta=BETA, desirable_weight=2.0,
        ),
        theirs,
        CHOSEN, REF_CHOSEN,
    )  # fmt: skip


def test_orpo_and_simpo():
    def orpo(c, r, nc, nr):
        a, b = c / nc, r / nr
        log_odds = (a - b) - (torch.log1p(-torch.exp(a)) - torch.log1p(-torch.exp(b)))
        return -a - BETA * F.logsigmoid(log_odds)

    check(lambda *x: orpo_loss(*x, beta=BETA), orpo, CHOSEN, REJECTED, *TOKENS)
    check(
        lambda *x: simpo_loss(*x, beta=2.0, margin=0.5),
        lambda c, r, nc, nr: -F.logsigmoid(2.0 * (c / nc - r / nr) - 0.5),
        CHOSEN, REJECTED, *TOKENS,
    )  # fmt: skip


def test_orpo_at_certainty_stays_finite():
    sure = jnp.array([-1e-12])
    args = (sure, jnp.array([-3.0]), jnp.ones(1), jnp.ones(1))
    value, gradient = jax.value_and_grad(lambda c: orpo_loss(c, *args[1:], beta=0.1)[0])(sure)
    assert np.isfinite(value) and np.isfinite(gradient).all()


LEVELS = np.array([[2.0, 1.0, 1.0, 0.0], [1.0, 0.0, 9.0, 9.0], [3.0, 3.0, 9.0, 9.0]])
PRESENT = np.array([[True] * 4, [True, True, False, False], [True, True, False, False]])
SCORES = RNG.normal(0, 1, (3, 4))
MARGINS = np.array([0.0, 0.7, 0.0])


def test_every_pair_of_a_prompt_weighs_alike():
    """Ouyang et al. 2022, equation 1, with Llama 2's margin, in plain loops."""
    with jax.enable_x64(True):
        losses, sums = bradley_terry_loss(*map(jnp.asarray, (SCORES, LEVELS, PRESENT, MARGINS)))
    for g in range(3):
        terms = []
        for i, j in itertools.permutations(range(4), 2):
            if PRESENT[g, i] and PRESENT[g, j] and LEVELS[g, i] > LEVELS[g, j]:
                difference = SCORES[g, i] - SCORES[g, j] - MARGINS[g]
                terms.append(np.log1p(np.exp(-difference)))
        assert float(losses[g]) == pytest.approx(np.mean(terms) if terms else 0.0, rel=1e-9)
    assert float(sums["prompts"]) == 2 and float(sums["pairs"]) == 5 + 1


def test_equal_scores_cost_log_2_and_are_half_right():
    losses, sums = bradley_terry_loss(
        jnp.zeros((3, 4)), jnp.asarray(LEVELS), jnp.asarray(PRESENT), jnp.zeros(3)
    )
    np.testing.assert_allclose(losses, [np.log(2), np.log(2), 0.0], rtol=1e-6)
    assert float(sums["correct"]) == 3.0


def test_ties_have_rao_and_kuppers_probability():
    """π_i/(π_i + θ π_j) to win, so that win, loss and tie sum to 1."""
    eta, difference = 0.4, 0.9
    theta = np.exp(eta)
    strengths = np.exp([difference, 0.0])
    win = strengths[0] / (strengths[0] + theta * strengths[1])
    lose = strengths[1] / (strengths[1] + theta * strengths[0])

    def loss(levels):
        return bradley_terry_loss(
            jnp.array([[difference, 0.0]]),
            jnp.array([levels]),
            jnp.ones((1, 2), bool),
            jnp.zeros(1),
            tie_threshold=eta,
        )[0][0]

    assert float(jnp.exp(-loss([1.0, 0.0]))) == pytest.approx(win, rel=1e-5)
    assert float(jnp.exp(-loss([0.0, 1.0]))) == pytest.approx(lose, rel=1e-5)
    assert float(jnp.exp(-loss([1.0, 1.0]))) == pytest.approx(1 - win - lose, rel=1e-5)


def test_absent_responses_touch_nothing():
    scores = jnp.asarray(SCORES).at[1, 2:].set(jnp.nan).at[2].set(1e6)

    def loss(scores):
        args = map(jnp.asarray, (LEVELS, PRESENT, MARGINS))
        return jnp.sum(bradley_terry_loss(jnp.where(PRESENT, scores, 0.0), *args)[0])

    gradient = jax.grad(loss)(scores)
    assert np.isfinite(gradient).all() and not gradient[2].any() and not gradient[1, 2:].any()
    wins, ties = pairs_of(jnp.asarray(LEVELS), jnp.asarray(PRESENT))
    assert not wins[2].any() and int(ties[2].sum()) == 1 and int(ties[0].sum()) == 1
