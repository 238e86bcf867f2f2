"""The parametric fit: known constants come back, from every start, within their intervals."""

import dataclasses

import numpy as np
import pytest

from llm.scaling.held_out import hold_out_loss
from llm.scaling.parametric import fit_from_starts, fit_parametric, hoffmann_starts
from llm.scaling.runs import NotIdentifiableError, Runs, split_by_flops
from llm.scaling.surface import CONSTANTS, LossSurface
from tests.scaling.synthetic import (
    BESIROGLU,
    HOFFMANN,
    LOPSIDED,
    SYMMETRIC,
    grid,
    isoflop_grid,
    noisy,
)

DESIGNS = {
    "rectangle": (HOFFMANN, grid(6, 6)),
    "lopsided exponents, off-centre budgets": (
        LOPSIDED,
        isoflop_grid(LOPSIDED, width=5.0, off=lambda c: 2.0, num_budgets=5, num_sizes=8),
    ),
}


@pytest.mark.parametrize("surface", [HOFFMANN, BESIROGLU, SYMMETRIC, LOPSIDED])
def test_constants_come_back_exactly_without_noise(surface):
    fit = fit_parametric(
        Runs.of(*grid(5, 6), surface.loss(*grid(5, 6))), num_draws=100, starts=hoffmann_starts(20)
    )
    for name in CONSTANTS:
        assert float(getattr(fit.surface, name)) == pytest.approx(
            float(getattr(surface, name)), rel=1e-5
        )
    assert fit.estimates()["alpha"].high == pytest.approx(float(surface.alpha), rel=1e-4)


def test_the_optimum_is_the_minimum_along_a_budget():
    flops = 5.76e23
    sizes = np.geomspace(1e9, 1e12, 20001)
    for surface in (HOFFMANN, LOPSIDED):
        loss = surface.loss(sizes, flops / 6 / sizes)
        num_params, num_tokens = surface.optimum(flops)
        assert float(num_params) == pytest.approx(sizes[loss.argmin()], rel=1e-3)
        assert float(6 * num_params * num_tokens) == pytest.approx(flops)
    # Hoffmann et al. 2022, Table 2: a = 0.46 and b = 0.54 by the third approach.
    assert float(HOFFMANN.params_exponent) == pytest.approx(0.46, abs=0.01)


def test_chinchilla_s_ratio_of_tokens_to_parameters_comes_out_of_besiroglu_s_constants():
    # Besiroglu et al. 2024, section 4: about 20 tokens per parameter at Chinchilla's compute, in
    # place of about 70 by Hoffmann's constants.
    for surface, low, high in ((BESIROGLU, 15, 27), (HOFFMANN, 60, 110)):
        num_params, num_tokens = surface.optimum(5.76e23)
        assert low < num_tokens / num_params < high


@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_hold_the_truth_as_often_as_they_say(design):
    """Of 90% intervals 91 to 96% held it in 150 tables of each design; here 50 are drawn."""
    surface, sizes = DESIGNS[design]
    tables, held = 50, dict.fromkeys((*CONSTANTS, "params_exponent", "optimum"), 0)
    logs = [np.log(surface.A), np.log(surface.B), np.log(surface.E), surface.alpha, surface.beta]
    start = np.array([logs], float)  # all starts end at one optimum: the next test
    for seed in range(tables):
        runs = noisy(surface, sizes, 0.005, seed)
        fit = fit_parametric(runs, num_draws=120, level=0.9, seed=seed, starts=start)
        found = {**fit.estimates(), "optimum": fit.optimum(1e24).num_params}
        truth = {name: float(getattr(surface, name)) for name in CONSTANTS}
        truth |= {"params_exponent": float(surface.params_exponent)}
        truth |= {"optimum": float(surface.optimum(1e24)[0])}
        for name in held:
            held[name] += found[name].low <= truth[name] <= found[name].high
    for name, count in held.items():  # four standard deviations of a binomial below 90%
        assert count / tables > 0.9 - 4 * np.sqrt(0.09 / tables), (name, count)
    assert np.mean(list(held.values())) / tables > 0.85


@pytest.mark.parametrize("design", DESIGNS)
def test_every_start_ends_at_one_optimum(design):
    """From the raw grid of the paper: none is moved or left out beforehand."""
    surface, sizes = DESIGNS[design]
    minimum, _ = fit_from_starts(noisy(surface, sizes, 0.005, 0), hoffmann_starts(150))
    assert minimum.converged.all() and minimum.arrived().all()
    assert len(hoffmann_starts()) == 4500 == len(np.unique(hoffmann_starts(), axis=0))


def test_starts_that_end_elsewhere_are_reported():
    """One loss twice as high among others is no optimum of the law: two ends, both counted."""
    minimum, _ = fit_from_starts(noisy(HOFFMANN, grid(6, 6), 0.005, 0), hoffmann_starts(20))
    split = dataclasses.replace(minimum, objective=minimum.objective * np.r_[np.ones(18), 2, 3])
    assert split.arrived().sum() == 18


def test_outliers_are_found_named_and_left_out_by_the_stated_rules():
    runs = noisy(HOFFMANN, grid(7, 7), 0.002, 0)
    loss = runs.loss.copy()
    loss[[3, 20]] *= 1.2
    runs = dataclasses.replace(runs, loss=loss)
    few = {"num_draws": 0, "starts": hoffmann_starts(20)}
    auto = fit_parametric(runs, outliers="auto", **few)
    assert runs.row[~auto.kept].tolist() == [5, 22]
    assert "rows 5, 22" in auto.notes[0]
    assert fit_parametric(runs, outliers=2, **few).kept.tolist() == auto.kept.tolist()
    highest = fit_parametric(runs, outliers=("highest", 3), **few)
    assert set(np.flatnonzero(~highest.kept)) == set(np.argsort(runs.loss)[-3:])
    # Without leaving any out, the Huber loss keeps the constants near: 2 rows of 49 are 20% off.
    plain = fit_parametric(runs, **few)
    assert float(plain.surface.alpha) == pytest.approx(0.34, abs=0.02)


def test_points_of_one_training_curve_are_resampled_together():
    """Copies of a run add nothing: with their runs numbered the intervals stay as wide."""
    runs = noisy(HOFFMANN, grid(6, 6), 0.005, 0)
    rows = np.repeat(np.arange(36), 4)
    numbered = dataclasses.replace(runs.select(rows), run=rows)
    loose = dataclasses.replace(numbered, run=np.arange(len(rows)))
    width = {}
    for name, table in {"runs": runs, "numbered": numbered, "loose": loose}.items():
        alpha = fit_parametric(table, starts=hoffmann_starts(5)).estimates()["alpha"]
        width[name] = alpha.high - alpha.low
    assert width["numbered"] == pytest.approx(width["runs"], rel=0.15)
    assert width["loose"] < 0.65 * width["runs"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n, d: (n[:1].repeat(49), d, HOFFMANN), "sizes of model: 1"),
        (lambda n, d: (n[:2].repeat(25)[:49], d, HOFFMANN), "sizes of model: 2"),
        (lambda n, d: (n, d[:1].repeat(49), HOFFMANN), "amounts of tokens: 1"),
        (lambda n, d: (n, 20 * n, HOFFMANN), "one ratio of tokens to parameters"),
        (lambda n, d: (n, 1e21 / 6 / n, HOFFMANN), "one compute budget"),
        (lambda n, d: (n[:7], d[:7] * np.r_[1:5, 1:4], HOFFMANN), "7 different runs"),
        (lambda n, d: (n, d, LossSurface.of(3.0, 0, 0, 0.3, 0.3)), "nothing to fit"),
        (lambda n, d: (n, d, LossSurface.of(4.0, -400, -400, 0.3, 0.3)), "rises with compute"),
    ],
)
def test_a_design_that_determines_nothing_is_refused(make, message):
    num_params, num_tokens, surface = make(*grid(7, 7))
    runs = Runs.of(num_params, num_tokens, surface.loss(num_params, num_tokens))
    with pytest.raises(NotIdentifiableError, match=message):
        fit_parametric(runs, num_draws=50)


@pytest.mark.parametrize(
    ("surface", "term"),
    [
        (LossSurface.of(1.7, 0, 410.7, 0.34, 0.28), "A/N^α"),
        (LossSurface.of(1.7, 406.4, 0, 0.34, 0.28), "B/D^β"),
        (LossSurface.of(3.0, 0, 0, 0.3, 0.3), ""),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_a_term_that_is_not_there_is_refused(surface, term, seed):
    runs = noisy(surface, grid(7, 7), 0.005, seed)
    with pytest.raises(NotIdentifiableError) as caught:
        fit_parametric(runs, starts=hoffmann_starts(20))
    assert term in str(caught.value)


def test_no_irreducible_loss_is_told():
    fit = fit_parametric(
        noisy(LossSurface.of(0, 406, 410, 0.34, 0.28), grid(7, 7), 0.005, 1),
        starts=hoffmann_starts(20),
    )
    assert fit.estimates()["E"].low < 0.01
    assert any("E cannot be told from 0" in note for note in fit.notes)


def test_held_out_larger_runs_are_foretold_within_the_interval():
    runs = noisy(HOFFMANN, grid(10, 10), 0.005, 3)
    smaller, larger = split_by_flops(runs, 0.2)
    assert smaller.flops.max() < larger.flops.min() and len(larger) >= 20
    rng = np.random.default_rng(0)
    held_out = hold_out_loss(
        runs,
        lambda a, b: fit_parametric(a, starts=hoffmann_starts(20)).predict(b, rng),
        fraction=0.2,
        level=0.95,
    )
    scores = held_out.scores()
    assert scores["num_runs"] == len(larger)
    assert scores["mean_relative_error"] < 0.008  # of the noise: 0.005·√(2/π) = 0.0040
    assert scores["r_squared"] > 0.97
    assert scores["share_in_interval"] >= 0.8
