"""The minimiser: the published objective, its gradient, and the mistakes that others have made."""

import numpy as np
import pytest
from scipy import optimize

from llm.scaling.parametric import fit_parametric, hoffmann_starts
from llm.scaling.robust import huber, minimise, numerical_curvature, objective_and_gradient
from llm.scaling.surface import LogSurface
from tests.scaling.synthetic import BESIROGLU, grid, noisy

RUNS = noisy(BESIROGLU, grid(15, 16), 0.005, seed=0)


class Uncentred(LogSurface):
    """log L in the paper's own (a, b, e, α, β)."""

    def __init__(self, runs):
        super().__init__(runs.num_params, runs.num_tokens)
        self.log_params, self.log_tokens = np.log(runs.num_params), np.log(runs.num_tokens)
        self.middle = (0.0, 0.0)


def test_huber_is_the_paper_s():
    # Hoffmann et al. 2022, eq. 3: a square inside delta, a line outside, joined smoothly.
    np.testing.assert_allclose(huber(np.array([0.0, 5e-4, -2e-3])), [0.0, 1.25e-7, 1.5e-6])


def test_the_objective_is_a_sum_over_runs_in_log_sum_exp_form():
    theta = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])
    terms = [
        theta[0] - theta[3] * np.log(RUNS.num_params),
        theta[1] - theta[4] * np.log(RUNS.num_tokens),
        np.full(240, theta[2]),
    ]
    residual = np.abs(np.logaddexp.reduce(terms, axis=0) - np.log(RUNS.loss))
    expected = np.where(residual < 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4)).sum()
    value, _ = objective_and_gradient(Uncentred(RUNS), np.log(RUNS.loss), theta)
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_gradient_and_curvature_are_those_of_finite_differences(delta):
    law, log_loss = Uncentred(RUNS), np.log(RUNS.loss)
    rng = np.random.default_rng(1)
    for _ in range(5):
        theta = np.array([6.0, 7.5, 0.55, 0.35, 0.36]) * (1 + 0.03 * rng.normal(size=5))
        _, gradient = objective_and_gradient(law, log_loss, theta, delta=delta)
        numerical = optimize.approx_fprime(
            theta, lambda t: objective_and_gradient(law, log_loss, t, delta=delta)[0], 1e-7
        )
        np.testing.assert_allclose(gradient, numerical, rtol=2e-3, atol=1e-4 * delta)
        pull = rng.normal(size=(1, len(RUNS)))
        exact = law.curvature(theta[None], law.linearise(theta[None])[1], pull)
        np.testing.assert_allclose(
            exact, numerical_curvature(law, theta[None], pull), rtol=1e-4, atol=1e-3
        )


def test_the_minimum_is_where_scipy_ends_with_tight_tolerances():
    fit = fit_parametric(RUNS, num_draws=0, starts=hoffmann_starts(20))
    law, log_loss = Uncentred(RUNS), np.log(RUNS.loss)
    begin = np.array([6.2, 7.3, 0.58, 0.345, 0.35])
    found = optimize.minimize(
        lambda t: objective_and_gradient(law, log_loss, t),
        begin,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 20000},
    )
    assert found.fun == pytest.approx(fit.objective, rel=1e-9)
    ours = [np.log(fit.surface.A), np.log(fit.surface.B), np.log(fit.surface.E)]
    ours += [fit.surface.alpha, fit.surface.beta]
    np.testing.assert_allclose(found.x, ours, rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "options"),
    [(1 / 240, {}), (1.0, {"ftol": 1e-5, "gtol": 1e-3})],
    ids=["the mean in place of the sum", "loose tolerances"],
)
def test_the_mistakes_of_others_give_another_answer(scale, options):
    """A mean of Huber losses is near 1e-6: scipy's default tolerances stop on the way down.

    Besiroglu et al. 2024 found this in Hoffmann et al. 2022, whose A and B come out nearly equal.
    """
    law, log_loss = Uncentred(RUNS), np.log(RUNS.loss)

    def objective(theta):
        value, gradient = objective_and_gradient(law, log_loss, theta)
        return value * scale, gradient * scale

    found = [
        optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        for start in hoffmann_starts(40)
    ]
    best = min(found, key=lambda result: result.fun)
    fit = fit_parametric(RUNS, num_draws=200, starts=hoffmann_starts(20))
    estimates = fit.estimates()
    assert best.fun / scale > 1.5 * fit.objective
    a, b, e, alpha, beta = best.x
    for name, value in {"E": np.exp(e), "A": np.exp(a), "alpha": alpha, "beta": beta}.items():
        assert not estimates[name].low <= value <= estimates[name].high, name
    assert abs(a - b) < 0.1  # what the tell-tale of Hoffmann's 406.4 and 410.7 looks like
    # Summed and tight, the same starts and the same scipy find ours (the test above).
    for name in ("E", "A", "B", "alpha", "beta"):
        wide = estimates[name].high - estimates[name].low
        assert abs(estimates[name].value - float(getattr(BESIROGLU, name))) < 1.5 * wide


def test_weights_count_rows_and_a_bound_holds():
    law, log_loss = LogSurface(RUNS.num_params, RUNS.num_tokens), np.log(RUNS.loss)
    start = law.centred(np.array([[6.2, 7.3, 0.58, 0.345, 0.35]]))
    twice = np.ones((1, len(RUNS)))
    twice[0, :50] = 2.0
    weighted = minimise(law, log_loss, start, twice)
    rows = np.concatenate([np.arange(240), np.arange(50)])
    again = LogSurface(RUNS.num_params[rows], RUNS.num_tokens[rows])
    repeated = minimise(again, log_loss[rows], start)
    assert weighted.objective[0] == pytest.approx(repeated.objective[0], rel=1e-9)
    bound = np.array([-np.inf, -np.inf, 0.7, -np.inf, -np.inf])
    held = minimise(law, log_loss, np.maximum(start, bound), lower=bound)
    assert held.theta[0, 2] == 0.7 and held.converged[0]
    assert held.objective[0] > minimise(law, log_loss, start).objective[0]
