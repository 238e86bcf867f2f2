"""Who goes on at a rung, by hand-counted examples, and what a sweep then costs."""

import pytest

from llm.launch.config import HalvingConfig
from llm.launch.halving import keep_best, members_by_rung, num_kept, rungs

NAN = float("nan")


@pytest.mark.parametrize(
    ("num", "factor", "kept"), [(9, 3, 3), (8, 3, 3), (7, 3, 3), (3, 3, 1), (2, 3, 1), (1, 3, 1)]
)
def test_a_third_goes_on_rounded_up(num, factor, kept):
    assert num_kept(num, factor) == kept


@pytest.mark.parametrize(
    ("values", "smallest", "kept"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, True, ["b", "c"]),
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, False, ["d", "a"]),
        # diverged or failed members lose to any number, and do not fill a place that is free
        ({"a": NAN, "b": None, "c": 1e9, "d": 7.0}, True, ["d", "c"]),
        ({"a": NAN, "b": None, "c": -1e9, "d": None}, False, ["c"]),
        ({"b": 1.0, "a": 1.0, "c": 1.0, "d": 0.5}, True, ["d", "b"]),  # a tie: as they stand
        ({"a": None, "b": NAN}, True, ["a"]),  # one is always left
    ],
)
def test_the_best_go_on(values, smallest, kept):
    assert keep_best(values, 2, smallest=smallest) == kept


def test_rungs_past_the_end_are_none():
    halving = HalvingConfig(at_steps=(10, 30, 90), factor=3)
    assert rungs(halving, 90) == [10, 30] and rungs(halving, None) == [10, 30, 90]
    assert rungs(None, 90) == []
    assert members_by_rung(27, halving, 100) == [27, 9, 3, 1]


@pytest.mark.parametrize("steps", [(), (20, 10), (10, 10), (0,)])
def test_rungs_must_rise(steps):
    with pytest.raises(ValueError, match="halving.at_steps="):
        HalvingConfig(at_steps=steps)
