"""The envelope of training curves: exponents come back; too few curves are refused."""

import dataclasses

import numpy as np
import pytest

from llm.scaling.envelope import fit_envelope, hold_out_envelope, training_curves
from llm.scaling.runs import NotIdentifiableError, Runs
from tests.scaling.synthetic import HOFFMANN, SYMMETRIC


def curves(surface, num_sizes: int, num_points: int = 20) -> Runs:
    sizes, tokens = np.geomspace(1e7, 1e10, num_sizes), np.geomspace(3e8, 1e12, num_points)
    num_params, num_tokens = (x.ravel() for x in np.meshgrid(sizes, tokens, indexing="ij"))
    run = np.repeat(np.arange(num_sizes), num_points)
    return Runs.of(num_params, num_tokens, surface.loss(num_params, num_tokens), run=run)


@pytest.mark.parametrize("surface", [HOFFMANN, SYMMETRIC])
def test_many_curves_give_the_exponent_and_the_optimum(surface):
    fit = fit_envelope(curves(surface, 40), num_draws=200)
    truth, found = float(surface.params_exponent), fit.estimates()["params_exponent"]
    assert found.value == pytest.approx(truth, abs=0.004)
    assert found.low - 0.002 <= truth <= found.high + 0.002
    best = fit.optimum(1e20)
    assert best.num_params.value == pytest.approx(float(surface.optimum(1e20)[0]), rel=0.04)
    assert best.tokens_per_param.value == pytest.approx(
        best.num_tokens.value / best.num_params.value
    )
    # The envelope lies on the surface's least loss: never below, hardly above.
    least = np.array([surface.loss_each(*surface.optimum(c)) for c in fit.flops])
    assert (fit.loss > least - 1e-6).all() and (fit.loss < least + 0.01).all()


def test_ends_where_the_best_model_may_be_outside_are_left_out():
    fit = fit_envelope(curves(HOFFMANN, 16), num_draws=20)
    assert fit.num_censored > 0
    assert 1e7 < fit.num_params.min() and fit.num_params.max() < 1e10


def test_few_sizes_make_the_interval_wide():
    width = {}
    for num_sizes in (8, 40):
        found = fit_envelope(curves(HOFFMANN, num_sizes)).estimates()["params_exponent"]
        width[num_sizes] = found.high - found.low
    assert width[8] > 5 * width[40]


def test_curves_are_rows_of_one_run_or_of_one_size():
    runs = curves(HOFFMANN, 4, 5)
    by_size = dataclasses.replace(runs, run=np.arange(len(runs)))
    for table in (runs, by_size):
        found = training_curves(table)
        assert [len(curve.flops) for curve in found] == [5] * 4
        assert all((np.diff(curve.flops) > 0).all() for curve in found)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda runs: runs.num_params < 1.1e7, "training curve .2 points or more.: 1 "),
        (lambda runs: runs.num_tokens < 4e8, "training curve .2 points or more.: 0 "),
        (lambda runs: runs.num_params > 2e9, "models are the best at some compute"),
    ],
)
def test_a_table_without_crossing_curves_is_refused(chosen, message):
    runs = curves(HOFFMANN, 16)
    with pytest.raises(NotIdentifiableError, match=message):
        fit_envelope(runs.select(chosen(runs)))


def test_the_upper_part_of_the_envelope_is_foretold():
    held_out = hold_out_envelope(curves(HOFFMANN, 40), fraction=0.2, num_draws=100)
    assert held_out.fitted_up_to_flops < held_out.flops.min()
    assert held_out.scores()["mean_relative_error"] < 0.1


def test_an_exponent_that_may_be_zero_is_refused():
    # A grid of sizes whose inner ones are shuffled: the best is now this one, now that one.
    runs, sizes = curves(HOFFMANN, 40), np.geomspace(1e7, 1e10, 40)
    order = np.r_[0, 1 + np.random.default_rng(0).permutation(38), 39]
    shuffled = sizes[order][runs.run]
    swapped = Runs.of(shuffled, runs.flops / (6 * shuffled), runs.loss, run=runs.run)
    with pytest.raises(NotIdentifiableError, match="the best size does not grow with compute"):
        fit_envelope(swapped)
