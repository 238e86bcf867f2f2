"""Figures of held-out comparisons, counted by hand."""

import numpy as np
import pytest

from llm.evaluation.preferences import Bin, MarginBin, compare_pairs, report_preferences


def test_accuracy_loss_and_calibration_of_four_pairs():
    # Confidences: 1/2 (half right), 3/4 (right and wrong), 9/10 (right).
    differences = np.array([0.0, np.log(3), -np.log(3), np.log(9)])
    report = report_preferences(differences, np.ones(4), num_bins=5)
    assert report.pairs == 4 and report.accuracy == 2.5 / 4
    expected = np.log(2) + np.log(4 / 3) + np.log(4) + np.log(10 / 9)
    assert report.loss_nats == pytest.approx(expected / 4)
    half, quarter, sure = report.calibration
    assert half == Bin(0.5, 0.5, 1)
    assert (quarter.predicted, quarter.observed, quarter.pairs) == (pytest.approx(0.75), 0.5, 2)
    assert (sure.predicted, sure.observed, sure.pairs) == (pytest.approx(0.9), 1.0, 1)
    assert report.calibration_error == pytest.approx((2 * 0.25 + 0.1) / 4)
    assert report.by_margin == ()  # the labels have one size: nothing to compare
    with pytest.raises(ValueError, match="no held-out pair"):
        report_preferences(np.zeros(0), np.zeros(0))


def test_accuracy_by_margin_goes_by_what_people_said():
    """Not by how far the scores lie apart: these are equally sure everywhere."""
    differences = np.array([1.0, -1.0, 1.0, 1.0, 0.0])
    margins = np.array([0.1, 0.3 - 0.2, 2.0, 2.0, 2.0])
    assert report_preferences(differences, margins).by_margin == (
        MarginBin(0.1, 0.5, 2),
        MarginBin(2.0, 2.5 / 3, 3),
    )


def test_many_margins_share_bins_of_about_equal_size():
    margins = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    found = report_preferences(np.where(margins > 40, 1.0, -1.0), margins).by_margin
    assert [each.pairs for each in found] == [20] * 5
    assert [each.accuracy for each in found] == [0, 0, 1, 1, 1]
    assert [each.margin for each in found] == [10.5, 30.5, 50.5, 70.5, 90.5]


def test_all_pairs_of_a_prompt_are_compared_by_rating_or_margin():
    scores = [np.array([3.0, 1.0, 0.5]), np.array([2.0, 2.5])]
    levels = [np.array([5.0, 4.0, 1.0]), np.array([1.0, 1.0])]
    differences, margins = compare_pairs(scores, levels, [0.0, 0.0])
    assert differences.tolist() == [2.0, 2.5, 0.5] and margins.tolist() == [1.0, 4.0, 3.0]
    levels[1] = np.array([1.0, 0.0])
    differences, margins = compare_pairs(scores, levels, [0.0, 0.7])
    assert differences.tolist() == [2.0, 2.5, 0.5, -0.5]
    assert margins.tolist() == [0.0, 0.0, 0.0, 0.7]
