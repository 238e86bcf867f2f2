"""Forecasts: exact where the law holds, Student's interval, coverage by simulation, refusals."""

import numpy as np
import pytest
from scipy import stats

from llm.scaling.curve_laws import LogisticLaw, PowerLaw
from llm.scaling.forecasts import forecast, forecast_each, forecast_exact_match
from llm.scaling.runs import NotIdentifiableError

X = np.log(np.geomspace(1e5, 1e8, 9))
CUT = X[6]  # six places below, three to foretell


def power(x):
    return 20 * np.exp(-0.2 * x)


def with_floor(x):
    return 0.5 + 300 * np.exp(-0.45 * x)


def accuracy(x):
    return 0.1 + 0.9 / (1 + np.exp(-(x - 15.5) / 1.2))


LAWS = {
    "power": (PowerLaw(), power),
    "floor": (PowerLaw(floor=True), with_floor),
    "logistic": (LogisticLaw(chance=0.1), accuracy),
}


def noisy(name, rng, num_seeds):
    noise = rng.normal(0, 0.03, (len(X), num_seeds))
    mean = LAWS[name][1](X)[:, None]
    return np.clip(mean + noise, 0, 1) if name == "logistic" else mean * np.exp(noise)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_that_holds_is_foretold_exactly(name):
    law, curve = LAWS[name]
    result = forecast(X, np.repeat(curve(X)[:, None], 2, 1), law, cut=CUT)
    np.testing.assert_allclose(result.predicted, np.repeat(curve(X[6:]), 2), rtol=1e-3)
    assert result.num_fitted == 12
    assert result.scores()["skill"] > 0.99
    np.testing.assert_array_equal(result.x, np.repeat(X[6:], 2))


def test_the_interval_of_a_power_law_is_students():
    """Of a line in logs: prediction ± t·s·√(1 + 1/n + (x − x̄)²/Sxx), six points, four free."""
    y = noisy("power", np.random.default_rng(0), 1)
    result = forecast(X, y, PowerLaw(), cut=CUT, num_draws=100_000)
    x, logs = X[:6], np.log(y[:6, 0])
    line = stats.linregress(x, logs)
    s = np.sqrt(((logs - line.intercept - line.slope * x) ** 2).sum() / 4)
    leverage = 1 + 1 / 6 + (X[6:] - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    middle = line.intercept + line.slope * X[6:]
    half = stats.t.ppf(0.975, 4) * s * np.sqrt(leverage)
    np.testing.assert_allclose(np.log(result.predicted), middle, atol=1e-9)
    np.testing.assert_allclose(np.log(result.low), middle - half, atol=0.03 * half.max())
    np.testing.assert_allclose(np.log(result.high), middle + half, atol=0.03 * half.max())


@pytest.mark.parametrize("name", LAWS)
def test_runs_lie_in_the_interval_as_often_as_stated(name):
    rng, law = np.random.default_rng(1), LAWS[name][0]
    results = [
        forecast(X, noisy(name, rng, 3), law, cut=CUT, num_draws=200, seed=i) for i in range(60)
    ]
    # Nine rows of one curve share the doubt about the law, so that curves and not rows count.
    shares = np.array([result.inside.mean() for result in results])
    assert shares.mean() >= 0.95 - 3 * shares.std() / np.sqrt(len(shares))
    assert np.mean([r.scores()["skill"] for r in results]) > 0.7
    # Of use: narrower than the change that it foretells.
    change = abs(LAWS[name][1](X[-1]) - LAWS[name][1](X[5]))
    assert np.median([(r.high - r.low)[-1] for r in results]) < change


def test_a_wrong_law_shows():
    """A power law without floor, on a curve with one: worse than to expect no change."""
    y = noisy("floor", np.random.default_rng(0), 3)
    wrong, right = forecast_each(X, y, [PowerLaw(), PowerLaw(floor=True)], cut=CUT)
    assert wrong.scores()["skill"] < 0 < right.scores()["skill"]
    assert wrong.scores()["mean_signed_error"] < 0
    assert wrong.scores()["share_in_interval"] < 1 == right.scores()["share_in_interval"]


def test_exact_match_is_foretold_before_it_rises():
    """Schaeffer et al.: below the cut exact match is at most 2%, token accuracy tells the rest."""
    rng = np.random.default_rng(0)
    tokens = np.clip(accuracy(X)[:, None] + rng.normal(0, 0.01, (9, 3)), 0, 1)
    exact = rng.binomial(2000, accuracy(X)[:, None] ** 8, (9, 3)) / 2000
    assert exact[:6].max() <= 0.02 and exact[-1].min() > 0.4
    result = forecast_exact_match(
        X, tokens, exact, answer_tokens=8, cut=CUT, law=LogisticLaw(chance=0.1)
    )
    scores = result.scores()
    assert scores["skill"] > 0.7 and scores["share_in_interval"] == 1.0
    assert scores["naive_mean_absolute_error"] > 0.2
    alone = forecast(X, tokens, LogisticLaw(chance=0.1), cut=CUT)
    np.testing.assert_allclose(result.predicted, alone.predicted**8)
    np.testing.assert_allclose(result.high, alone.high**8, rtol=1e-2)
    assert result.law == "logistic token accuracy to the power 8"


def test_scores_are_means_over_runs():
    y = np.array([[1.0], [0.5], [0.25], [0.125], [0.1]])  # halves at each place, but for the last
    x = np.arange(5.0)
    result = forecast(x, y, PowerLaw(), cut=3.0)
    np.testing.assert_allclose(result.predicted, [0.125, 0.0625])
    assert result.naive == 0.25
    assert result.scores() == pytest.approx(
        {
            "num_runs": 2,
            "mean_absolute_error": 0.0375 / 2,
            "mean_signed_error": -0.0375 / 2,
            "naive_mean_absolute_error": (0.125 + 0.15) / 2,
            "skill": 1 - 0.0375 / 0.275,
            "share_in_interval": 0.5,
        }
    )


def test_scores_at_chance_foretell_nothing():
    rng = np.random.default_rng(0)
    late = 0.1 + 0.9 / (1 + np.exp(-(X - 18) / 0.3))[:, None] + rng.normal(0, 0.02, (9, 3))
    law = LogisticLaw(chance=0.1)
    with pytest.raises(NotIdentifiableError, match="do not rise above chance .0.1. .* the cut up"):
        forecast(X, late, law, cut=CUT)
    (result,) = forecast_each(X, late, [law], cut=CUT)
    assert "do not rise" in result.refused and np.isnan(result.predicted).all()
    assert np.isnan(result.scores()["share_in_interval"])
    assert result.scores()["naive_mean_absolute_error"] > 0.1  # of the others, all the same


def test_missing_seeds_are_left_out():
    y = noisy("power", np.random.default_rng(0), 3)
    y[1, 2] = y[7, 0] = np.nan
    result = forecast(X, y, PowerLaw(), cut=CUT)
    assert (result.num_fitted, len(result.measured)) == (17, 8)


@pytest.mark.parametrize("cut", [X[2], X[-1] + 1])
def test_a_cut_without_places_on_both_sides_is_refused(cut):
    with pytest.raises(NotIdentifiableError, match="places lie below the cut"):
        forecast(X, noisy("power", np.random.default_rng(0), 1), PowerLaw(), cut=cut)


def test_what_a_law_cannot_be_is_refused():
    with pytest.raises(ValueError, match="positive scores; the least is -1"):
        forecast(X, np.full((9, 1), -1.0), PowerLaw(), cut=CUT)
    with pytest.raises(ValueError, match="increase"):
        forecast(X[::-1], np.ones((9, 1)), PowerLaw(), cut=CUT)
    with pytest.raises(ValueError, match="chance 1.0 and ceiling 0.5"):
        LogisticLaw(chance=1.0, ceiling=0.5)
