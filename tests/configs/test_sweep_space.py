"""The members that a sweep's functions make, and distributions by their definitions."""

import math

import numpy as np
import pytest

from configs.dataclass_config import ConfigError
from configs.sweep_space import (
    choice,
    grid,
    integers,
    listed,
    log_uniform,
    product,
    random,
    uniform,
    when,
    zipped,
)


def test_a_grid_is_every_combination_the_last_field_fastest():
    assert grid({"a": [1, 2], "b": ["x", "y"]}) == (
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    )


def test_zipped_goes_in_step_and_sums_follow_each_other():
    steps = zipped({"depth": [2, 4], "rate": [0.1, 0.05]})
    assert steps == ({"depth": 2, "rate": 0.1}, {"depth": 4, "rate": 0.05})
    assert steps + listed({"depth": 8}) == (*steps, {"depth": 8})


def test_conditional_fields_come_to_those_that_fit():
    members = product(
        grid({"optimizer.name": ["adamw", "muon"]}),
        when(
            {"optimizer.name": "muon"},
            grid({"optimizer.beta1": [0.9, 0.95]}),
            otherwise=listed({"optimizer.beta2": 0.99}),
        ),
        listed({"seed": 1}),
    )
    assert members == (
        {"optimizer.name": "adamw", "optimizer.beta2": 0.99, "seed": 1},
        {"optimizer.name": "muon", "optimizer.beta1": 0.9, "seed": 1},
        {"optimizer.name": "muon", "optimizer.beta1": 0.95, "seed": 1},
    )


def test_random_draws_stay_when_members_or_fields_are_added():
    few = random(3, 7, {"a": log_uniform(1e-4, 1e-2)})
    more = random(5, 7, {"b": uniform(0, 1), "a": log_uniform(1e-4, 1e-2)})
    assert [member["a"] for member in more[:3]] == [member["a"] for member in few]
    assert random(3, 8, {"a": log_uniform(1e-4, 1e-2)}) != few
    assert all(set(member) == {"a", "b"} for member in more)


def test_distributions_are_what_they_are_called():
    rng = np.random.default_rng(0)
    logs = [math.log10(log_uniform(1e-4, 1e-2)(rng)) for _ in range(4000)]
    assert min(logs) >= -4 and max(logs) <= -2
    # mean and variance of a uniform on [-4, -2]: -3 and 1/3; standard errors 0.009 and 0.005
    assert np.mean(logs) == pytest.approx(-3, abs=0.04)
    assert np.var(logs) == pytest.approx(1 / 3, abs=0.02)
    flat = [uniform(2, 4)(rng) for _ in range(4000)]
    assert np.mean(flat) == pytest.approx(3, abs=0.04) and 2 <= min(flat) and max(flat) <= 4
    whole = [integers(1, 3)(rng) for _ in range(300)]
    assert set(whole) == {1, 2, 3} and all(type(each) is int for each in whole)
    assert {choice(["x", "y"])(rng) for _ in range(50)} == {"x", "y"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: zipped({"a": [1, 2], "b": [1]}), "a has 2, b has 1"),
        (lambda: grid({"a": 3}), "grid: a needs a list of values, got 3"),
        (lambda: grid({"a": "adamw"}), "grid: a needs a list of values, got 'adamw'"),
        (lambda: grid({"a": []}), r"grid: a needs a list of values, got \[\]"),
        (lambda: log_uniform(0, 1), r"log_uniform\(0, 1\): give two positive numbers"),
        (
            lambda: product(listed({"b": 1}), when({"a": 1}, listed({"c": 1}))),
            "when: no factor before it sets a; those before set b",
        ),
    ],
)
def test_what_cannot_be_is_one_line(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
