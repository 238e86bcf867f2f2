"""Advantages, reward shaping and KL control, against loops, closed forms and publications."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.objectives.policy_gradient import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
)
from llm.rl.advantages import (
    gae,
    group_advantages,
    informative_groups,
    init_running_scale,
    leave_one_out_advantages,
    masked_whiten,
    overlong_penalty,
    response_penalties,
    scale_scores,
    token_rewards,
)
from llm.rl.config import KLConfig
from llm.rl.kl import best_of_n_kl_bound, update_kl_coefficient

MASK = jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


def test_the_score_comes_at_the_last_token_and_divergence_at_each():
    kl = jnp.arange(16.0).reshape(4, 4)
    found = token_rewards(jnp.array([10.0, 20.0, 30.0, 40.0]), kl, MASK, 0.5)
    expected = [[0, -0.5, 9, 0], [18, 0, 0, 0], [-4, -4.5, -5, 24.5], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.99, 0.0)])
def test_gae_is_the_sum_that_defines_it(gamma, lam):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        rewards, values = rng.normal(size=(2, 4, 4))
        mask = np.asarray(MASK, np.float64)
        advantages, returns = gae(
            *map(jnp.asarray, (rewards * mask, values * mask, mask)), gamma=gamma, lam=lam
        )
    for b in range(4):
        length = int(mask[b].sum())
        for t in range(4):
            expected = 0.0
            for s in range(t, length):
                after = values[b, s + 1] if s + 1 < length else 0.0
                error = rewards[b, s] + gamma * after - values[b, s]
                expected += (gamma * lam) ** (s - t) * error
            expected = expected if t < length else 0.0
            assert float(advantages[b, t]) == pytest.approx(expected, abs=1e-12)
            plus_value = expected + values[b, t] if t < length else 0.0
            assert float(returns[b, t]) == pytest.approx(plus_value, abs=1e-12)


def test_groups_by_hand():
    scores = jnp.array([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1]])
    np.testing.assert_allclose(group_advantages(scores, std=False)[0], [-2, -1, 3])
    deviation = np.std([1, 2, 6], ddof=1)
    np.testing.assert_allclose(
        group_advantages(scores, std=True)[0], np.array([-2, -1, 3]) / (deviation + 1e-4), rtol=1e-6
    )
    np.testing.assert_allclose(leave_one_out_advantages(scores)[0], [-3, -1.5, 4.5])
    assert informative_groups(scores).tolist() == [True, False]
    # 0.1 is not a binary fraction: its mean may differ from it in the last bit
    for advantages in (
        group_advantages(scores, std=False),
        group_advantages(scores, std=True),
        leave_one_out_advantages(scores),
    ):
        assert advantages[1].tolist() == [0.0, 0.0, 0.0]


def test_overlong_responses_are_punished_softly():
    lengths = jnp.array([1, 80, 90, 100, 101])
    found = overlong_penalty(lengths, max_length_tokens=100, buffer_tokens=20)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])


def test_a_response_cut_at_the_limit_is_punished_once():
    lengths = jnp.array([80, 90, 100, 100, 40])
    finished = jnp.array([True, True, True, False, False])
    for missing_eos, buffer, expected in (
        (0.3, 0, [0, 0, 0, 0.3, 0.3]),
        (0.3, 20, [0, 0.5, 1, 1, 0.3]),
        (2.0, 20, [0, 0.5, 1, 2, 2]),
    ):
        found = response_penalties(
            lengths, finished, max_length_tokens=100, missing_eos=missing_eos,
            overlong_buffer_tokens=buffer,
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_whitening_is_over_what_is_not_masked():
    x = jnp.array([[1.0, 3.0, 99.0], [5.0, 7.0, -99.0]])
    mask = jnp.array([[1.0, 1, 0], [1, 1, 0]])
    white = masked_whiten(x, mask)
    np.testing.assert_allclose(white[:, :2].ravel(), np.array([-3, -1, 1, 3]) / 5**0.5, rtol=1e-6)
    assert not white[:, 2].any()
    assert not jnp.isnan(masked_whiten(x, mask * 0)).any()


def test_scores_are_scaled_by_all_seen_and_not_shifted():
    rng = np.random.default_rng(1)
    batches = [rng.normal(5.0, 3.0, size) for size in (7, 1, 40)]
    state = init_running_scale()
    for i, batch in enumerate(batches):
        state, scaled = scale_scores(state, jnp.asarray(batch, jnp.float32))
        seen = np.concatenate(batches[: i + 1])
        np.testing.assert_allclose(scaled, batch / seen.std(), rtol=1e-4)
    same = jnp.full(4, 2.5)
    np.testing.assert_array_equal(scale_scores(init_running_scale(), same)[1], same)


def test_a_batch_without_tokens_teaches_nothing():
    nothing = jnp.zeros((2, 3))

    def loss(x):
        policy, sums = clipped_policy_loss(x, x * 2.0, jnp.ones((2, 3)), nothing)
        value, _ = clipped_value_loss(x, x, x + 1, nothing, clip=0.2)
        total, count = aggregate(policy + value, nothing, "sequence_mean")
        assert float(jnp.sum(nothing)) == 0
        return total / jnp.maximum(count, 1.0) + 0.0 * sums["ratio"]

    gradient = jax.grad(loss)(jnp.full((2, 3), 1e4))  # ratios that would overflow
    assert gradient.tolist() == [[0.0] * 3] * 2
    assert explained_variance(nothing, nothing, nothing) == 0


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum"])
def test_sums_and_counts_of_parts_add_up(mode):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
    whole = aggregate(x, MASK, mode)
    halves = [aggregate(x[i : i + 2], MASK[i : i + 2], mode) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.sum(halves, axis=0), rtol=1e-6)


def test_modes_of_aggregation_by_hand():
    x = jnp.array([[1.0, 2.0], [4.0, 0.0]])
    mask = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    assert [float(v) for v in aggregate(x, mask, "token_mean")] == [7.0, 3.0]
    assert [float(v) for v in aggregate(x, mask, "sequence_mean")] == [5.5, 2.0]
    assert [float(v) for v in aggregate(x, mask, "sequence_sum")] == [7.0, 2.0]
    weights = jnp.array([[0.5], [0.25]])  # of sequences
    assert [float(v) for v in aggregate(x, mask * weights, "token_mean")] == [2.5, 1.25]
    assert [float(v) for v in aggregate(x, mask * weights, "sequence_mean")] == [1.75, 0.75]
    assert [float(v) for v in aggregate(x, mask * weights, "sequence_sum")] == [2.5, 0.75]


def test_clips_by_hand():
    """Equation 7 of Schulman et al. 2017 at ratios 1/2, 1 and 2, with a wider clip above."""
    log_probs = jnp.log(jnp.array([[0.5, 1.0, 2.0]]))
    ones = jnp.ones((1, 3))
    up, sums = clipped_policy_loss(log_probs, 0 * ones, ones, ones, clip_low=0.2, clip_high=0.3)
    np.testing.assert_allclose(up, [[-0.5, -1.0, -1.3]], rtol=1e-6)
    assert float(sums["clip_fraction"]) == 1 and float(sums["ratio"]) == pytest.approx(3.5)
    down, sums = clipped_policy_loss(log_probs, 0 * ones, -ones, ones, clip_low=0.2, clip_high=0.3)
    np.testing.assert_allclose(down, [[0.8, 1.0, 2.0]], rtol=1e-6)
    assert float(sums["clip_fraction"]) == 1
    value, sums = clipped_value_loss(
        jnp.array([[1.0, 0.1]]), jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]), ones[:, :2], clip=0.2
    )
    np.testing.assert_allclose(value, [[0.5, 0.5 * 0.81]], rtol=1e-6)


def test_the_steered_coefficient_follows_ziegler():
    fixed = KLConfig(coefficient=0.1)
    assert float(
        update_kl_coefficient(jnp.float32(0.1), jnp.float32(99), fixed, 64)
    ) == pytest.approx(0.1)
    steered = KLConfig(coefficient=0.1, target_nats=6.0, horizon_responses=1000)
    for kl, error in ((6.0, 0.0), (12.0, 0.2), (0.0, -0.2), (6.6, 0.1)):
        found = update_kl_coefficient(jnp.float32(0.1), jnp.float32(kl), steered, 64)
        assert float(found) == pytest.approx(0.1 * (1 + error * 64 / 1000), rel=1e-5)


def test_best_of_n_diverges_by_at_most_the_bound_and_reaches_it():
    """Of outcomes ordered by reward the best of n is the i-th with probability F(i)ⁿ − F(i−1)ⁿ."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 4, 16):
        gaps = []
        for outcomes in (3, 30, 3000):
            p = rng.dirichlet(np.ones(outcomes) * 5)
            cumulative = np.concatenate([[0.0], np.cumsum(p)])
            best = np.diff(cumulative**n)
            kept = best > 0
            divergence = np.sum(best[kept] * np.log(best[kept] / p[kept]))
            gaps.append(best_of_n_kl_bound(n) - divergence)
        assert min(gaps) > -1e-9
        assert gaps[2] < 0.01 and (n == 1 or gaps[0] > gaps[1] > gaps[2])
