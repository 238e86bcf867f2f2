"""Mixtures: closed-form shares at every prefix, random access, exact ends."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data.mixture import make_mixture

decimal_weights = st.lists(st.integers(1, 400).map(lambda n: n / 100), min_size=1, max_size=6)


def named(weights):
    return {f"source{i}": weight for i, weight in enumerate(weights)}


@hypothesis.given(decimal_weights)
@hypothesis.settings(deadline=None)
def test_every_prefix_holds_each_share_to_within_one_row(weights):
    mixture = make_mixture(named(weights))
    n = np.arange(2 * mixture.period + 3)
    source, earlier = mixture.locate(n)
    for index, weight in enumerate(weights):
        rows_so_far = np.cumsum(source == index)
        assert (np.abs(rows_so_far - (n + 1) * weight / sum(weights)) < 1 + 1e-9).all()
        # The j-th row of a source is row j of that source: none skipped, none twice.
        assert (earlier[source == index] == np.arange(rows_so_far[-1])).all()


@hypothesis.given(decimal_weights, st.integers(0, 2**32 - 1))
def test_locating_one_row_needs_no_history(weights, row):
    mixture = make_mixture(named(weights))
    one_source, one_earlier = mixture.locate(np.array([row]))
    source, earlier = mixture.locate(np.arange(row, row + 1000))
    assert source[0] == one_source[0] and earlier[0] == one_earlier[0]


def test_a_mixture_small_enough_to_write_down():
    mixture = make_mixture({"prose": 0.7, "code": 0.3})
    source, _ = mixture.locate(np.arange(20))
    names = [mixture.names[index] for index in source]
    assert names[:10] == names[10:]
    assert names.count("prose") == 14 and names.count("code") == 6
    assert mixture.period == 10  # through the decimals typed, not their binary neighbours


def test_equal_weights_alternate():
    source, earlier = make_mixture({"a": 5.0, "b": 5.0}).locate(np.arange(6))
    assert source.tolist() == [0, 1, 0, 1, 0, 1]
    assert earlier.tolist() == [0, 0, 1, 1, 2, 2]


def test_awkward_weights_are_rounded_to_a_period():
    weights = {"a": 1 / 3, "b": 2 / 3 - 1e-7, "c": 0.001}
    mixture = make_mixture(weights)
    shares = mixture.rows_per_period / mixture.period
    exact = np.array(list(weights.values())) / sum(weights.values())
    assert mixture.period == 16384
    assert np.abs(shares - exact).max() < 1 / 16384
    n = np.arange(mixture.period)
    source, _ = mixture.locate(n)
    for index, share in enumerate(shares):
        assert (np.abs(np.cumsum(source == index) - (n + 1) * share) < 1).all()


@hypothesis.given(decimal_weights, st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_the_first_row_beyond_a_limit(weights, limits):
    mixture = make_mixture(named(weights))
    limits = np.array(limits[: len(weights)])
    end = mixture.first_row_beyond(limits)
    source, earlier = mixture.locate(np.arange(end + 1))
    assert (earlier[:-1] < limits[source[:-1]]).all()
    assert earlier[-1] == limits[source[-1]]


def test_a_zero_weight_leaves_a_source_out():
    assert make_mixture({"a": 0.0, "b": 2.0}).names == ("b",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0}, "weight of source 'a' is -1.0"),
        ({"a": float("nan")}, "weight of source 'a' is nan"),
        ({"a": 0.0}, "no source has a positive weight"),
        ({}, "no source has a positive weight"),
        ({"a": 1.0, "b": 1e-7}, "weight of source 'b' is 1e-07, less than 1/16384"),
    ],
)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        make_mixture(weights)
