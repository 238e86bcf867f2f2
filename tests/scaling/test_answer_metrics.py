"""What scores of answers say of each other: closed forms, all cases counted, and models drawn."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from llm.evaluation.answers import answer_scores
from llm.scaling.answer_metrics import (
    constant_baseline,
    exact_match_bounds,
    exact_match_if_independent,
    exact_match_of_length,
    greedy_accuracy_bound,
    likeliest_accuracy,
    uniform_baseline,
)


def test_exact_match_of_independent_tokens_is_the_product():
    accuracies = np.array([[0.5, 0.5, 0.5], [1.0, 0.9, 0.8]])
    np.testing.assert_allclose(exact_match_if_independent(accuracies), [0.125, 0.72])
    np.testing.assert_allclose(exact_match_of_length(np.array([0.5, 0.9]), 3), [0.125, 0.729])


def test_exact_match_lies_between_its_bounds_and_reaches_them():
    """Every way in which 4 answers of 2 tokens can be right or wrong."""
    seen = {}
    for bits in itertools.product([0, 1], repeat=8):
        right = np.array(bits, bool).reshape(4, 2)
        seen.setdefault(tuple(right.mean(0)), []).append(right.all(1).mean())
    for accuracies, exact in seen.items():
        low, high = exact_match_bounds(np.array(accuracies))
        assert (min(exact), max(exact)) == (low, high)


def draw_scores(sharpness: float, seed: int) -> dict[str, float]:
    """Scores of a random model of 8 tokens on 400 answers of 3."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 8, (400, 3))
    logits = rng.normal(0, 1, (400, 3, 8))
    logits[np.arange(400)[:, None], np.arange(3), targets] += sharpness * rng.exponential(
        1, (400, 3)
    )
    weights = jnp.ones((400, 3))
    scores = answer_scores(jnp.array(logits), jnp.array(targets), weights)
    return {name: float(value) for name, value in scores.items()}


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 10.0, 30.0])
def test_nats_bound_what_greedy_decoding_gets_right(sharpness):
    scores = draw_scores(sharpness, seed=0)
    nats = np.array([scores["answer_nats"] / 3, scores["answer_nats"]])
    tokens, answers = greedy_accuracy_bound(nats)
    assert scores["token_accuracy"] >= tokens
    assert scores["exact_match"] >= answers
    if sharpness == 30.0:
        assert tokens > 0.5  # it says something


def test_the_bound_is_reached():
    """A quarter of the tokens at 1/2 and, tied, wrong; the others certain."""
    assert greedy_accuracy_bound(np.array(0.25 * np.log(2))) == pytest.approx(0.75)
    assert greedy_accuracy_bound(np.array(2.0)) == 0.0


def test_likeliest_accuracy_is_below_that_of_sampling():
    probabilities = np.random.default_rng(0).uniform(0.01, 1, 1000)
    bound = likeliest_accuracy(np.array(-np.log(probabilities).mean()))
    assert bound < probabilities.mean()
    assert likeliest_accuracy(np.array(-np.log(0.3))) == pytest.approx(0.3)


def test_chance_by_counting_all_guesses():
    answer = (2, 0)
    guesses = list(itertools.product(range(3), repeat=2))
    right = np.array(guesses) == answer
    baseline = uniform_baseline(3, np.array([2]))
    assert baseline.exact_match == pytest.approx(right.all(1).mean())
    assert baseline.token_accuracy == pytest.approx(right.mean())
    assert baseline.answer_nats == pytest.approx(np.log(len(guesses)))
    mixed = uniform_baseline(10, np.array([1, 3]))
    assert mixed.exact_match == pytest.approx((0.1 + 0.001) / 2)
    assert mixed.answer_nats == pytest.approx(2 * np.log(10))


def test_the_best_constant_answer_of_all_sums_of_two_digits():
    """Of 100 sums, 9 is the commonest (10 pairs); 0 leads 55 of them; last digits are even."""
    sums = np.add.outer(np.arange(10), np.arange(10)).ravel()
    baseline = constant_baseline(np.stack([sums // 10, sums % 10], 1))
    assert baseline.exact_match == pytest.approx(0.10)
    assert baseline.token_accuracy == pytest.approx((0.55 + 0.10) / 2)
    leading = -(0.55 * np.log(0.55) + 0.45 * np.log(0.45))
    assert baseline.answer_nats == pytest.approx(leading + np.log(10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_match_if_independent(np.array([0.5, 1.5])), "1.5"),
        (lambda: exact_match_of_length(np.array([0.5]), 0), "one at least"),
        (lambda: likeliest_accuracy(np.array([-0.1])), "-0.1"),
        (lambda: uniform_baseline(0, np.array([1])), "alphabet 0"),
        (lambda: uniform_baseline(10, np.array([2, 0])), "none is empty"),
        (lambda: constant_baseline(np.zeros((0, 2), int)), "there must be one"),
    ],
)
def test_impossible_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
