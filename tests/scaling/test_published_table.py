"""The published table of 234 small runs, which lies outside the repository, by every method."""

import pathlib

import numpy as np
import pytest

from llm.scaling.envelope import fit_envelope
from llm.scaling.held_out import hold_out_loss
from llm.scaling.isoflop import fit_isoflop
from llm.scaling.kaplan import fit_kaplan
from llm.scaling.parametric import fit_parametric, hoffmann_starts
from llm.scaling.table import load_runs
from tests.scaling.synthetic import BESIROGLU

TABLE = (
    pathlib.Path(__file__).resolve().parents[3]
    / "shared/data/small_runs_compute_params_tokens_loss.csv"
)
pytestmark = pytest.mark.skipif(not TABLE.exists(), reason="the published tables are not here")


@pytest.fixture(scope="module")
def runs():
    return load_runs(TABLE).runs


def test_the_surface_is_found_from_every_start(runs):
    """234 runs of kyo-takano/chinchilla, read off Hoffmann's figure: one optimum from every start.

    Besiroglu et al. 2024 fitted 240 of the same figure: E 1.8172, α 0.3478 and β 0.3658 lie in or
    near the intervals; Hoffmann's own E 1.69 and β 0.28 do not.
    """
    assert len(runs) == 234
    fit = fit_parametric(runs, starts=hoffmann_starts(200))
    assert (fit.starts.arrived, fit.starts.converged) == (200, 200)
    estimates = fit.estimates()
    expected = {"E": 1.7839, "alpha": 0.3426, "beta": 0.3420, "params_exponent": 0.4995}
    for name, value in expected.items():
        assert estimates[name].value == pytest.approx(value, abs=2e-4)
    for name in ("E", "alpha", "beta"):
        assert estimates[name].low <= float(getattr(BESIROGLU, name)) <= estimates[name].high
    assert estimates["E"].low > 1.69 and estimates["beta"].low > 0.285
    assert 10 < fit.optimum(5.76e23).tokens_per_param.value < 40  # Chinchilla's own was 20


def test_all_methods_agree_on_the_exponent_of_the_best_size(runs):
    """Hoffmann et al. 2022, Table 2: 0.50, 0.49 and, by the misfitted third approach, 0.46."""
    fits = (fit_isoflop(runs), fit_envelope(runs), fit_kaplan(runs, num_draws=100))
    for fit, expected in zip(fits, (0.511, 0.530, 0.541), strict=True):
        found = fit.estimates()["params_exponent"]
        assert found.value == pytest.approx(expected, abs=1e-3)
        assert found.low < 0.52 and found.high > 0.49


def test_the_largest_fifth_is_foretold_within_one_percent(runs):
    rng = np.random.default_rng(0)
    few = hoffmann_starts(20)
    held_out = hold_out_loss(
        runs,
        lambda a, b: fit_parametric(a, starts=few).predict(b, rng),
        fraction=0.2,
        level=0.95,
    )
    scores = held_out.scores()
    assert (scores["num_runs"], held_out.num_fitted) == (49, 185)
    assert scores["mean_relative_error"] == pytest.approx(0.0084, abs=2e-4)
    # The residuals of smaller runs understate how far larger ones scatter: not 95%.
    assert 0.5 < scores["share_in_interval"] < 0.9
