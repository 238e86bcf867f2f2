"""Scores by loss and by compute: the README's R² of Pythia, naive loops, and wrong tables."""

import pathlib

import numpy as np
import pytest

from llm.scaling.loss_perspective import fit_score, load_scores
from llm.scaling.runs import NotIdentifiableError

PYTHIA = pathlib.Path(__file__).resolve().parents[3] / "shared/data/pythia_zero_shot_flat.csv"
R_SQUARED = {  # shared/data/README.md: cubics in log compute and log perplexity, steps ≥ 1,000
    "arc_easy": (0.910, 0.987),
    "piqa": (0.919, 0.989),
    "sciq": (0.750, 0.985),
}


@pytest.mark.skipif(not PYTHIA.exists(), reason="the published table is not here")
def test_pythias_scores_follow_loss_more_than_compute():
    table = load_scores(PYTHIA, list(R_SQUARED), min_step=1000)
    assert len(table.model) == 256 and len(set(table.model)) == 16
    for name, (by_compute, by_loss) in R_SQUARED.items():
        fits = [
            fit_score(x, table.scores[name], table.model_numbers)
            for x in (table.log_flops, table.log_perplexity)
        ]
        assert fits[0].r_squared == pytest.approx(by_compute, abs=1e-3)
        assert fits[1].r_squared == pytest.approx(by_loss, abs=1e-3)
        # A model that was left out is told by its loss nearly as well.
        assert fits[1].held_out_r_squared == pytest.approx(by_loss, abs=0.005)


@pytest.fixture
def curves():
    """Four models of ten checkpoints, the score a parabola of the predictor with noise."""
    rng = np.random.default_rng(0)
    model = np.repeat(np.arange(4), 10)
    x = rng.uniform(2, 5, 40)
    return x, 1 - 0.1 * (x - 2) ** 2 + rng.normal(0, 0.05, 40), model


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_r_squared_is_polyfits(curves, degree):
    x, y, model = curves
    fit = fit_score(x, y, model, degree=degree)
    residual = y - np.polyval(np.polyfit(x, y, degree), x)
    assert fit.r_squared == pytest.approx(1 - residual.var() / y.var())
    adjusted = 1 - (1 - fit.r_squared) * 39 / (39 - degree)
    assert fit.adjusted_r_squared == pytest.approx(adjusted)
    np.testing.assert_allclose(fit.at(x), y - residual, atol=1e-8)


def test_held_out_r_squared_by_a_naive_loop(curves):
    x, y, model = curves
    rest = total = 0.0
    for out in range(4):
        others, mine = model != out, model == out
        coefficients = np.polyfit(x[others], y[others], 3)
        rest += ((y[mine] - np.polyval(coefficients, x[mine])) ** 2).sum()
        total += ((y[mine] - y[others].mean()) ** 2).sum()
    fit = fit_score(x, y, model)
    assert fit.held_out_r_squared == pytest.approx(1 - rest / total)
    assert np.isnan(fit_score(x, y, np.zeros(40, int)).held_out_r_squared)


def test_a_model_off_the_others_curve_shows_only_when_left_out():
    rng = np.random.default_rng(0)
    model = np.repeat(np.arange(3), 20)
    x = np.concatenate([rng.uniform(i, i + 1, 20) for i in range(3)])
    y = np.where(model == 2, 5 - x, x) + rng.normal(0, 0.01, 60)
    fit = fit_score(x, y, model)
    assert fit.r_squared > 0.9 and fit.held_out_r_squared < 0


def test_too_little_is_refused():
    x, model = np.arange(5.0), np.arange(5)
    with pytest.raises(NotIdentifiableError, match="5 rows .* degree 3 needs 6 rows"):
        fit_score(x, x, model)
    with pytest.raises(NotIdentifiableError, match="2 different values"):
        fit_score(np.arange(10.0) % 2, np.arange(10.0), np.arange(10))
    with pytest.raises(NotIdentifiableError, match="all 10 scores are 0.5"):
        fit_score(np.arange(10.0), np.full(10, 0.5), np.arange(10))
    with pytest.raises(ValueError, match="degree 0"):
        fit_score(np.arange(10.0), np.arange(10.0), np.arange(10), degree=0)


ROWS = "model,params,step,tokens,lambada_ppl,acc\na,1e6,0,0,9,0.1\na,1e6,10,2e7,5,0.3\n"


def write(folder, text):
    path = folder / "table.csv"
    path.write_text(text)
    return path


def test_columns_and_compute(tmp_path):
    table = load_scores(write(tmp_path, ROWS), ["acc"], min_step=1)
    assert table.model == ("a",) and table.scores["acc"].tolist() == [0.3]
    assert table.log_flops == pytest.approx(np.log(6 * 1e6 * 2e7))
    assert table.log_perplexity == pytest.approx(np.log(5))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (ROWS, {}, r"tokens is no positive number in 1 rows \(2; .*'0.0'"),
        (ROWS, {"min_step": 11}, "no row has step ≥ 11; the last is 10"),
        (ROWS.replace("lambada_ppl", "lambda_ppl"), {}, "did you mean 'lambda_ppl'"),
        (ROWS.replace("0.3", "high"), {"min_step": 1}, r"acc is no number in 1 rows \(3;.*'high'"),
        (ROWS.replace("5,0.3", "0,0.3"), {"min_step": 1}, "lambada_ppl is no positive number"),
        ("", {}, "is no CSV table"),
        (ROWS.split("\n")[0] + "\n", {}, "it has no rows"),
    ],
)
def test_a_wrong_table_is_told(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        load_scores(write(tmp_path, text), ["acc"], **options)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_scores(tmp_path / "none.csv", ["acc"])
