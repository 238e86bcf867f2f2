"""Charts: the numbers behind the lines, and drawings that any input leaves whole."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from llm.evaluation.figures import (
    bits_per_byte_figures,
    learning_rate_figure,
    loss_figure,
    metric_series,
    smooth,
    validation_figure,
)

ROWS = [
    {"step": 1, "train/loss": 9.0, "train/learning_rate": 0.0},
    {"step": 2, "train/loss": 7.0, "train/learning_rate": 2e-3},
    {"step": 2, "eval/prose/loss": 6.5, "eval/prose/bits_per_byte": 3.5},
    {"step": 4, "train/loss": math.nan, "train/learning_rate": 1e-3},
    {"step": 3, "train/loss": 6.0, "train/learning_rate": 2e-3},
    {"step": 3, "train/loss": 5.0},
    {"step": 4, "eval/prose/loss": 4.5, "eval/prose/bits_per_byte": 2.5},
]


def test_series_are_in_order_without_gaps_and_the_last_word_counts():
    steps, values = metric_series(ROWS, "train/loss")
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [9.0, 7.0, 5.0])
    steps, values = metric_series(ROWS, "eval/code/loss")
    assert len(steps) == len(values) == 0


def test_smoothing_narrows_at_the_start_and_keeps_straight_lines_straight():
    np.testing.assert_allclose(smooth(np.array([4.0, 1.0, 1.0, 7.0, 3.0]), 3), [4, 2, 3, 11 / 3, 5])
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line, 11)[:45], line[:45])
    assert len(smooth(np.zeros(0), 5)) == 0


def test_descriptions_say_what_the_curves_show():
    assert loss_figure(ROWS).description == (
        "Loss over steps 1 to 3; training ends at 5.000, validation: prose ends at 4.500."
    )
    assert "its peak is 0.002" in learning_rate_figure(ROWS).description
    assert "prose ends at 2.500" in validation_figure(ROWS).description


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS, [{"step": 1, "eval/$x_{/loss": 1.0}]])
@pytest.mark.parametrize("tokens_per_step", [None, 4096])
def test_any_rows_give_whole_drawings(rows, tokens_per_step):
    for figure in (
        loss_figure(rows, tokens_per_step=tokens_per_step),
        validation_figure(rows, baselines={"xz": 2.7}, tokens_per_step=tokens_per_step),
        learning_rate_figure(rows, tokens_per_step=tokens_per_step),
    ):
        root = ElementTree.fromstring(figure.svg)
        assert root.tag.endswith("svg")
        assert not [href for e in root.iter() for k, href in e.items()
                    if k.endswith("href") and not href.startswith("#")]  # fmt: skip


def test_long_runs_stay_small():
    rng = np.random.default_rng(0)
    rows = [{"step": i, "train/loss": float(x)} for i, x in enumerate(rng.normal(3, 1, 100_000))]
    assert len(loss_figure(rows).svg) < 1_000_000


def test_one_bar_chart_a_domain_with_every_predictor_that_has_a_number():
    bits = {
        "gzip": {"a/b $": 3.0, "all": 3.5},
        "model": {"a/b $": 1.5, "all": 1.75},
        "ngram": {"a/b $": math.nan, "all": 2.25},
    }
    first, second = bits_per_byte_figures(bits)
    assert first.name == "bits-per-byte-all"
    assert first.description == (
        "Bits per byte, all domains together: "
        "this model 1.750, Kneser–Ney n-gram 2.250, gzip 3.500."
    )
    assert second.description == "Bits per byte, a/b $: this model 1.500, gzip 3.000."
    # The bars are the filled paths; their widths are to each other as the numbers.
    widths = sorted(_bar_widths(first.svg))
    np.testing.assert_allclose(np.array(widths) / widths[0], [1, 2.25 / 1.75, 2], rtol=1e-4)


def _bar_widths(svg: str) -> list[float]:
    widths = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        colours = ("#0072b2", "#009e73", "#999999")
        if any(f"fill: {colour}" in path.get("style", "") for colour in colours):
            x = [float(part.split()[0]) for part in path.get("d").replace("M", "L").split("L")[1:]]
            widths.append(max(x) - min(x))
    return widths


def test_the_same_numbers_draw_the_same_bytes():
    assert loss_figure(ROWS).svg == loss_figure(ROWS).svg
