"""From a ladder's config to its runs: budgets by hand, and what cannot be is told."""

import pytest

from llm.scaling.accounting import num_active_params
from llm.scaling.config import LadderConfig
from llm.scaling.ladder import make_groups
from llm.training.config import ScheduleConfig

DATA = dict(vocab_size=256, length_tokens=32, batch_sequences=4)
COMMON = dict(width_per_layer=16, head_dim=16, schedule=ScheduleConfig(warmup_steps=1))


def test_a_flop_budget_is_six_params_a_token():
    ladder = LadderConfig(depths=(1, 2, 3), flops=(1e9, 4e9), **COMMON)
    for group in make_groups("l", ladder, **DATA):
        exact = group.budget / (6 * num_active_params(group.model))
        assert abs(group.num_tokens - exact) <= 64  # to the nearest step of 128 tokens
    assert len(make_groups("l", ladder, **DATA)) == 6


def test_lengths_out_of_the_range_of_tokens_a_parameter_are_left_out():
    ladder = LadderConfig(depths=(1, 2), tokens_per_param=(1.0, 5.0, 20.0), **COMMON)
    every = make_groups("l", ladder, **DATA)
    between = LadderConfig(
        depths=(1, 2),
        tokens_per_param=(1.0, 5.0, 20.0),
        tokens_per_param_between=(2.0, 20.0),
        **COMMON,
    )
    kept = make_groups("l", between, **DATA)
    assert [g.name for g in kept] == [g.name for g in every if g.budget >= 5]
    none = LadderConfig(
        depths=(1,), tokens_per_param=(1.0,), tokens_per_param_between=(2.0, 3.0), **COMMON
    )
    with pytest.raises(ValueError, match="no length has"):
        make_groups("l", none, **DATA)
    with pytest.raises(ValueError, match="larger most"):
        LadderConfig(tokens=(1,), tokens_per_param_between=(3.0, 3.0))
