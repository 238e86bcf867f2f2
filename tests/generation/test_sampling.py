"""Sampling against hand literals, transformers' warpers, and exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from llm.generation import sampling
from llm.generation.config import SamplingConfig

# probabilities 0.5, 0.25, 0.125, 0.125 in a shuffled order
PROBS = np.array([0.125, 0.5, 0.125, 0.25], np.float32)
LOGITS = jnp.log(PROBS)[None]


def kept(logits):
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


@pytest.mark.parametrize("k, want", [(1, [1]), (2, [1, 3]), (3, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_the_likeliest_and_ties_with_the_last(k, want):
    out = sampling.keep_top_k(LOGITS, k)
    assert kept(out) == want
    np.testing.assert_array_equal(out[0, want], LOGITS[0, want])


@pytest.mark.parametrize(
    "p, want", [(0.1, [1]), (0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (0.76, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, want):
    assert kept(sampling.keep_top_p(LOGITS, p)) == want


@pytest.mark.parametrize("p, want", [(0.6, [1]), (0.5, [1, 3]), (0.2, [0, 1, 2, 3])])
def test_min_p_is_relative_to_the_likeliest(p, want):
    assert kept(sampling.keep_min_p(LOGITS, p)) == want


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0, -jnp.inf]])
    seen = jnp.array([[True, True, False, False, True]])
    out = sampling.repetition_penalty(logits, seen, 2.0)
    np.testing.assert_array_equal(out, [[1.0, -4.0, 2.0, -2.0, -np.inf]])


def their_logits(logits, seen_ids, config):
    """What transformers does: its processors in the order of its `_get_logits_processor`."""
    scores, ids = torch.tensor(np.asarray(logits)), torch.tensor(seen_ids)
    steps = [theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    steps.append(theirs.TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None:
        steps.append(theirs.TopKLogitsWarper(config.top_k))
    if config.top_p is not None:
        steps.append(theirs.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        steps.append(theirs.MinPLogitsWarper(config.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.numpy()


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.7, top_k=7),
        SamplingConfig(temperature=1.3, top_p=0.9),
        SamplingConfig(temperature=0.5, min_p=0.1),
        SamplingConfig(temperature=0.8, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        SamplingConfig(temperature=2.0, top_k=5, top_p=0.3, repetition_penalty=0.7),
    ],
    ids=str,
)
def test_all_together_equal_transformers(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, 50)).astype(np.float32)
    seen_ids = rng.integers(0, 50, (6, 9))
    seen = np.zeros((6, 50), bool)
    np.put_along_axis(seen, seen_ids, True, axis=1)
    ours = jax.jit(sampling.sampling_logits, static_argnums=1)(logits, config, seen)
    np.testing.assert_allclose(ours, their_logits(logits, seen_ids, config), rtol=1e-6)


@settings(deadline=None, max_examples=60)
# no subnormal numbers: XLA takes them for zeros when it compares
@given(
    st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), min_size=2, max_size=9),
    st.integers(1, 9),
)
def test_top_k_by_bits_equals_top_k_by_sorting(values, k):
    values = (values + [0.0, -0.0] + [-np.inf] * 9)[:9]
    threshold = sorted(values, reverse=True)[k - 1]
    want = [x if x >= threshold else -np.inf for x in values]
    out = sampling.keep_top_k(jnp.array([values], jnp.float32), k)[0]
    np.testing.assert_array_equal(out, np.array(want, np.float32))


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float(np.sum((counts - expected) ** 2 / expected))


@pytest.mark.parametrize(
    "config, exact",
    [
        (SamplingConfig(), [0.125, 0.5, 0.125, 0.25]),
        # squares of the probabilities, which sum to 11/32
        (SamplingConfig(temperature=0.5), np.array([1, 16, 1, 4]) / 22),
        (SamplingConfig(top_p=0.7), [0, 2 / 3, 0, 1 / 3]),
        (SamplingConfig(top_k=2, temperature=2.0), [0, 2**0.5 / (1 + 2**0.5), 0, 1 / (1 + 2**0.5)]),
        (SamplingConfig(min_p=0.3), [0, 2 / 3, 0, 1 / 3]),
    ],
    ids=["plain", "cold", "top_p", "top_k, hot", "min_p"],
)
def test_draws_follow_the_exact_probabilities(config, exact):
    draws, exact = 20_000, np.asarray(exact)
    uniform = jax.random.uniform(jax.random.key(7), (draws, 2))
    logits = jnp.broadcast_to(LOGITS, (draws, 4))
    tokens, _ = jax.jit(lambda x, u: sampling.sample(x, u, config))(logits, uniform)
    counts = np.bincount(tokens, minlength=4)
    possible = exact > 0
    assert counts[~possible].sum() == 0
    # 16.27: the value that three degrees of freedom exceed once in a thousand
    assert chi_square(counts[possible], exact[possible]) < 16.27


def test_draws_follow_the_exact_probabilities_over_many_blocks_of_the_vocabulary():
    size, draws = 3 * sampling.BLOCK_TOKENS + 7, 40_000
    logits = np.random.default_rng(0).normal(0, 0.5, size).astype(np.float32)
    logits[sampling.BLOCK_TOKENS : 2 * sampling.BLOCK_TOKENS] = -np.inf  # a whole block
    uniform = jax.random.uniform(jax.random.key(3), (draws, 2))
    sample = jax.jit(
        lambda uniform: sampling.sample(jnp.tile(logits, (draws, 1)), uniform, SamplingConfig())
    )
    tokens, log_probs = sample(uniform)
    counts = np.bincount(tokens, minlength=size)
    possible = np.isfinite(logits)
    assert counts[~possible].sum() == 0 and len(counts) == size
    exact = np.exp(logits[possible]) / np.exp(logits[possible]).sum()
    assert exact.min() * draws > 10
    np.testing.assert_allclose(log_probs, np.log(exact)[np.cumsum(possible)[tokens] - 1], rtol=1e-5)
    # 355.8: the value that 262 degrees of freedom exceed once in ten thousand
    assert chi_square(counts[possible], exact) < 355.8


@pytest.mark.parametrize("size", [4, 128, 129, 400])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token(size):
    logits = jnp.full((2, size), -jnp.inf).at[:, jnp.array([1, size - 2])].set(0.0)
    uniform = jnp.array([[0.0, 0.0], [1 - 2.0**-23, 1 - 2.0**-23]])
    tokens, _ = sampling.sample(logits, uniform, SamplingConfig())
    assert tokens.tolist() == [1, size - 2]


def test_a_sequences_numbers_hang_on_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    numbers = sampling.uniform_pairs(keys, 50)
    assert len(np.unique(numbers)) == numbers.size
    np.testing.assert_array_equal(sampling.uniform_pairs(keys[1:2], 50)[0], numbers[1])
    np.testing.assert_array_equal(sampling.uniform_pairs(keys, 7), numbers[:, :7])


def test_a_row_depends_on_its_own_logits_and_numbers_alone():
    uniform = jax.random.uniform(jax.random.key(0), (5, 2))
    logits = jax.random.normal(jax.random.key(1), (5, 40))
    config = SamplingConfig(temperature=1.5, top_p=0.95)
    together, _ = sampling.sample(logits, uniform, config)
    alone = [sampling.sample(logits[i : i + 1], uniform[i : i + 1], config)[0] for i in range(5)]
    assert together.tolist() == np.concatenate(alone).tolist()


def test_temperature_zero_takes_the_likeliest_of_what_the_penalty_leaves():
    config = SamplingConfig(temperature=0.0, repetition_penalty=1.5)
    logits, uniform = jnp.array([[3.0, 2.5, 1.0]]), jnp.array([[0.9, 0.9]])
    seen = jnp.array([[True, False, False]])
    assert sampling.sample(logits, uniform, SamplingConfig(temperature=0.0))[0].tolist() == [0]
    assert sampling.sample(logits, uniform, config, seen)[0].tolist() == [1]


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}, {"repetition_penalty": 1.5}]
)
@pytest.mark.parametrize("temperature, weights", [(1.0, [1, 4, 1, 2]), (0.5, [1, 16, 1, 4]),
                                                  (0.0, [1, 4, 1, 2])])  # fmt: skip
def test_log_probs_are_of_the_temperature_and_not_of_the_filters(temperature, weights, filters):
    uniform = jax.random.uniform(jax.random.key(2), (50, 2))
    logits = jnp.broadcast_to(LOGITS + 3.0, (50, 4))
    config = SamplingConfig(temperature=temperature, **filters)
    seen = jnp.zeros((50, 4), bool).at[:, 1].set(True)
    tokens, log_probs = sampling.sample(logits, uniform, config, seen)
    assert len(set(tokens.tolist())) > 1 or temperature == 0.0
    np.testing.assert_allclose(log_probs, np.log(weights / np.sum(weights))[tokens], rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0: must be positive"),
        (dict(temperature=-1.0), "temperature=-1.0: must not be negative"),
        (dict(top_k=0), "top_k=0: must be positive"),
        (dict(top_p=0.0), r"top_p=0.0: must be in \(0, 1\]"),
        (dict(min_p=1.5), r"min_p=1.5: must be in \[0, 1\]"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0: must be positive"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
