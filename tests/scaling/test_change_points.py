"""Change points: simulations with a known truth for false alarms and coverage, and closed forms."""

import functools

import numpy as np
import pytest

from llm.scaling.change_points import ChangePoint, find_change_point
from llm.scaling.curve_shapes import change_shapes, smooth_shapes
from llm.scaling.runs import NotIdentifiableError

PLACES = np.linspace(0.0, 1.0, 8)
QUICK = {"num_draws": 99, "num_positions": 41}


def logistic(z):
    return 1 / (1 + np.exp(-z))


SMOOTH = {
    "line": lambda x: x,
    "parabola": lambda x: x**2,
    "power law": lambda x: np.exp(-2 * x),  # x is a logarithm
    "wide logistic": lambda x: logistic((x - 0.8) / 0.15),
}
KNEE, STEP = 0.5, 0.45
CHANGING = {
    "knee": (KNEE, lambda x: 2 * np.maximum(x - KNEE, 0)),
    "step": (STEP, lambda x: logistic((x - STEP) / 0.06)),
}


def gaussian(rng, mean, num_seeds):
    return mean[:, None] + rng.normal(0, 0.05, (len(mean), num_seeds))


def binomial(rng, mean, num_seeds):
    """Accuracies on 200 questions, of seeds that differ most in the middle."""
    spread = 0.1 * np.sqrt(np.clip(mean * (1 - mean), 0, 1))[:, None]
    seeds = mean[:, None] + rng.normal(0, 1, (len(mean), num_seeds)) * spread
    return rng.binomial(200, np.clip(seeds, 0, 1)) / 200


def runs(rng, mean, num_seeds):
    """Curves over steps: what a seed is off by at one place it nearly is at the next."""
    off = np.empty((len(mean), num_seeds))
    off[0] = rng.normal(0, 0.05, num_seeds)
    for i in range(1, len(mean)):
        off[i] = 0.8 * off[i - 1] + 0.6 * rng.normal(0, 0.05, num_seeds)
    return mean[:, None] + off


@functools.cache
def simulate(shape, noise, num_seeds, count=80, places=8, **options) -> list[ChangePoint]:
    rng = np.random.default_rng(0)
    x = np.linspace(0.0, 1.0, places)
    curve = SMOOTH[shape] if shape in SMOOTH else CHANGING[shape][1]
    return [
        find_change_point(x, noise(rng, curve(x), num_seeds), seed=i, **(QUICK | options))
        for i in range(count)
    ]


def share(found) -> float:
    found = list(found)
    return sum(found) / len(found)


def three_errors(rate: float, count: int) -> float:
    return 3 * np.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize(
    ("shape", "noise"), [*((shape, gaussian) for shape in SMOOTH), ("wide logistic", binomial)]
)
def test_a_smooth_curve_gets_no_change_point_more_often_than_stated(shape, noise):
    results = simulate(shape, noise, 3)
    assert share(r.found for r in results) <= 0.05 + three_errors(0.05, len(results))


def test_the_textbook_test_takes_a_parabola_for_a_knee():
    loose = simulate("parabola", gaussian, 3, count=20, smooth=("line",))
    assert share(r.found for r in loose) == 1.0
    strict = simulate("parabola", gaussian, 3)[:20]
    assert share(r.verdict == "bend" for r in strict) >= 0.9


@pytest.mark.parametrize("noise", [gaussian, binomial])
@pytest.mark.parametrize(("shape", "least_found"), [("knee", 0.3), ("step", 0.95)])
def test_the_truth_lies_in_its_interval_as_often_as_stated(shape, least_found, noise):
    results = simulate(shape, noise, 3)
    found = [r for r in results if r.found]
    assert len(found) >= least_found * len(results)
    truth = CHANGING[shape][0]
    covered = share(r.position.low <= truth <= r.position.high for r in found)
    assert covered >= 0.95 - three_errors(0.95, len(found))
    assert abs(np.median([r.position.value for r in found]) - truth) < 0.02
    # Of use: the interval is a small part of the range.
    assert np.median([r.position.high - r.position.low for r in found]) < 0.2


def test_the_shape_is_told():
    assert share(r.shape == "knee" for r in simulate("knee", gaussian, 3)) > 0.8
    assert share(r.shape == "step" for r in simulate("step", gaussian, 3)) == 1.0


def test_one_seed_with_independent_noise():
    smooth = simulate("wide logistic", gaussian, 1, places=12, count=80)
    assert share(r.found for r in smooth) <= 0.05 + three_errors(0.05, len(smooth))
    step = [r for r in simulate("step", gaussian, 1, places=12, count=80) if r.found]
    assert len(step) > 60
    covered = share(r.position.low <= STEP <= r.position.high for r in step)
    assert covered >= 0.95 - three_errors(0.95, len(step))
    assert all("one seed" in r.notes[0] and np.isnan(r.p_misfit) for r in step)


def test_noise_along_runs_needs_joint_draws():
    options = {"places": 20, "count": 60}
    joint = simulate("wide logistic", runs, 3, joint=True, **options)
    assert share(r.found for r in joint) <= 0.05 + three_errors(0.05, len(joint))
    step = [r for r in simulate("step", runs, 3, joint=True, **options) if r.found]
    assert len(step) > 45
    covered = share(r.position.low <= STEP <= r.position.high for r in step)
    assert covered >= 0.95 - three_errors(0.95, len(step))
    alone = simulate("wide logistic", runs, 1, places=40, count=30)
    assert share(r.found for r in alone) > 0.15  # the reason


def test_a_jump_can_come_from_the_metric():
    """Nats that fall as a power law, and exact match, which is e^(−nats): Schaeffer et al."""
    rng, x = np.random.default_rng(0), np.linspace(0, 1, 10)
    changes = {"exact match": 0, "log nats": 0}
    for i in range(20):
        nats = 20 * np.exp(-8 * x[:, None] + rng.normal(0, 0.05, (10, 3)))
        exact_match = rng.binomial(1000, np.exp(-nats)) / 1000
        changes["exact match"] += find_change_point(x, exact_match, seed=i, **QUICK).found
        changes["log nats"] += find_change_point(x, np.log(nats), seed=i, **QUICK).found
    assert changes["exact match"] == 20
    assert changes["log nats"] <= 3


# ------------------------------------------------------------------------------ closed forms


def test_what_a_knee_leaves_is_what_least_squares_leaves():
    rng = np.random.default_rng(1)
    x, y = np.sort(rng.uniform(0, 3, 9)), rng.normal(size=9)
    weights = rng.integers(1, 5, 9).astype(float)
    changes = change_shapes(x, weights, widest_step=0.5, num_positions=7)
    left = changes.profiles(y[None])[0][:, 0]
    for position, found in zip(changes.positions, left, strict=True):
        matrix = np.stack([np.ones(9), x, np.maximum(x - position, 0)], 1)
        root = np.sqrt(weights)
        residual = np.linalg.lstsq(matrix * root[:, None], y * root, rcond=None)[1]
        assert found == pytest.approx(residual[0])


def test_a_step_makes_76_percent_of_its_way_in_the_stated_share():
    x = np.linspace(0, 10, 101)
    changes = change_shapes(x, np.ones(101), widest_step=0.4, num_positions=9)
    assert 4 * changes.widths[-1] == pytest.approx(0.4 * 10)
    assert logistic(2) - logistic(-2) == pytest.approx(0.7616, abs=1e-4)
    # The widest step at the middle, and the narrowest smooth sigmoid, are one curve.
    widest = changes.steps.basis[4 * len(changes.widths) + len(changes.widths) - 1, 0]
    smooth = smooth_shapes("sigmoid", x, np.ones(101), widest_step=0.4).basis[:, 0]
    assert np.abs(smooth @ widest).max() == pytest.approx(1)


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_a_power_law_is_smooth(rate):
    """An exponential in log x is in the family to its grid: what is left is below 1e-5 of it."""
    y = np.exp(-rate * PLACES)
    shapes = smooth_shapes("sigmoid", PLACES, np.ones(8), widest_step=0.5)
    assert shapes.left_over(y[None]).min() < 1e-5 * ((y - y.mean()) ** 2).sum()


def test_without_noise_a_knee_is_found_and_smooth_curves_are_not():
    x = np.linspace(0, 1, 11)
    knee = find_change_point(x, np.repeat(3 * np.maximum(x - 0.5, 0)[:, None], 3, 1))
    assert knee.found and knee.shape == "knee"
    assert knee.position.value == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_allclose(knee.change_fit, knee.means, atol=1e-9)
    for curve in SMOOTH.values():
        assert not find_change_point(x, np.repeat(curve(x)[:, None], 3, 1)).found
    assert find_change_point(x, np.full((11, 3), 0.1)).verdict == "line"


def test_a_jump_is_anywhere_between_two_places():
    y = np.repeat((PLACES > 0.5).astype(float)[:, None], 3, 1)
    result = find_change_point(PLACES, y)
    assert result.shape == "step"
    below, above = PLACES[3], PLACES[4]
    assert result.position.value == pytest.approx((below + above) / 2, abs=0.01)
    assert result.position.low <= below + 0.01 and result.position.high >= above - 0.01
    assert result.position.high - result.position.low < 1.2 * (above - below)


def test_units_change_nothing():
    rng = np.random.default_rng(3)
    y = gaussian(rng, CHANGING["step"][1](PLACES), 3)
    one = find_change_point(PLACES, y)
    other = find_change_point(10 + 5 * PLACES, 7 - 100 * y)
    assert other.position.value == pytest.approx(10 + 5 * one.position.value)
    assert other.position.low == pytest.approx(10 + 5 * one.position.low)
    assert other.p_values == pytest.approx(one.p_values)
    again = find_change_point(PLACES, y)
    assert (again.position, again.p_values) == (one.position, one.p_values)


def test_an_interval_that_reaches_the_end_says_so():
    x = np.log(np.geomspace(1e5, 1e8, 6))
    noise = np.random.default_rng(1).normal(0, 0.2, (6, 4))
    y = np.maximum(np.arange(6) - 4, 0)[:, None] + noise
    result = find_change_point(x, y, smooth=("line",))
    assert result.found and result.position.high == np.inf
    assert np.isfinite(result.position.low)
    text = result.describe("parameters", np.exp)
    assert text.endswith("to the end of the data)") and "knee at parameters = " in text


def test_no_change_point_is_said_in_words():
    rng = np.random.default_rng(1)
    line = find_change_point(PLACES, gaussian(rng, PLACES, 3))
    assert (line.verdict, line.position) == ("line", None)
    assert line.describe().startswith("no change point: a line is enough (p = ")
    bend = find_change_point(PLACES, gaussian(rng, PLACES**3, 5))
    assert bend.describe().startswith("no change point: a smooth bend")


def test_a_curve_that_neither_shape_fits_is_noted():
    x = np.linspace(0, 1, 15)
    waves = np.sin(9 * x)[:, None] + np.random.default_rng(0).normal(0, 0.01, (15, 4))
    result = find_change_point(x, waves)
    assert result.p_misfit < 0.05
    if result.found:
        assert "neither a knee nor a step fits" in result.notes[0]


def test_missing_seeds_are_left_out():
    rng = np.random.default_rng(0)
    y = gaussian(rng, CHANGING["step"][1](PLACES), 4)
    y[2, 1] = y[5, 3] = np.nan
    result = find_change_point(PLACES, y)
    assert result.found
    assert result.means[2] == pytest.approx(y[2, [0, 2, 3]].mean())


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (PLACES[:4], np.zeros((4, 3)), {}, "4 places .* needs 5"),
        (PLACES[:7], np.zeros((7, 1)), {}, "7 places with a single seed .* needs 8"),
        (PLACES, np.zeros((8, 2)), {"joint": True}, "2 seeds"),
        (PLACES, np.where(np.eye(8, 3), np.nan, 0.0), {"joint": True}, "3 lack a score"),
    ],
)
def test_too_little_is_refused(x, y, options, message):
    with pytest.raises(NotIdentifiableError, match=message):
        find_change_point(x, y, **options)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (PLACES[::-1], np.zeros((8, 3)), {}, "increase"),
        (PLACES, np.full((8, 3), np.inf), {}, "infinite"),
        (PLACES, np.full((8, 3), np.nan), {}, "x = 0 has no score"),
        (PLACES, np.zeros((8, 3)), {"num_draws": 10}, "try 19"),
        (PLACES, np.zeros((8, 3)), {"smooth": ("quartic",)}, "'quartic': there are line"),
    ],
)
def test_a_wrong_curve_is_refused(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        find_change_point(x, y, **options)
