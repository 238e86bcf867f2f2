"""What the members of a sweep will take: FLOPs, and hours and price where a rate is known."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from configs.schema import (
    ComparisonStageConfig,
    FinetuneConfig,
    PretrainConfig,
    SweepConfig,
)
from experiments.loading import is_workdir, load_model_config
from experiments.sweep_members import SweepMember, members_given
from llm.launch.halving import members_by_rung, rungs
from llm.scaling.accounting import training_flops_per_token


@dataclasses.dataclass(frozen=True)
class Cost:
    """What runs take; None where it is not known."""

    flops: float | None
    hours: float | None = None
    price: float | None = None

    def __mul__(self, share: float) -> "Cost":
        return Cost(*(None if x is None else x * share for x in dataclasses.astuple(self)))


def cost_of(sweep: SweepConfig, member: SweepMember) -> Cost:
    """Return what a member takes in training, evaluations and start-up left out.

    Hours and price follow from the sweep's `cost`; nothing is assumed in its place.
    """
    flops, rate = training_flops(member.config), sweep.cost.flops_per_second
    price = sweep.cost.price_per_hour
    hours = None if flops is None or rate is None else flops / rate / 3600
    return Cost(flops, hours, None if hours is None or price is None else hours * price)


def training_flops(config: Any) -> float | None:
    """Return the FLOPs of a run's training, by the convention of MFU.

    None where a run's length or model is known only when it starts, and for stages that do more
    than train on rows. Of preferences the reference's forward pass is left out.
    """
    if isinstance(config, PretrainConfig):
        each = training_flops_per_token(config.model, config.data.length_tokens)
        return each * config.tokens_per_step * config.num_steps
    if not isinstance(config, FinetuneConfig | ComparisonStageConfig):
        return None
    if config.total_steps is None or config.adapter.rank or not is_workdir(config.source):
        return None
    rows = config.data if isinstance(config, FinetuneConfig) else config.comparisons
    each = training_flops_per_token(load_model_config(config.source), rows.length_tokens)
    return each * config.tokens_per_step * config.total_steps


def total(costs: Sequence[Cost]) -> Cost:
    """Return what runs take together; None for what is not known of all."""
    columns = zip(*map(dataclasses.astuple, costs), strict=True)
    return Cost(*(None if None in column else sum(column) for column in columns))


def total_with_halving(
    sweep: SweepConfig, members: Sequence[SweepMember], costs: Sequence[Cost]
) -> Cost:
    """Return what the sweep takes at most under its halving: the costliest members go on longest.

    Without halving it is the sum of all.
    """
    lengths = [member.total_steps for member in members]
    if sweep.halving is None or None in lengths:
        return total(costs)
    longest = max(lengths)
    counts = members_by_rung(len(members), sweep.halving, longest)
    ends = [*rungs(sweep.halving, longest), longest]
    ordered = sorted(
        zip(costs, lengths, strict=True), key=lambda each: each[0].flops or 0.0, reverse=True
    )
    parts = []
    for begin, end, count in zip([0, *ends[:-1]], ends, counts, strict=True):
        for cost, steps in ordered[:count]:
            parts.append(cost * (max(0, min(end, steps) - begin) / steps))
    return total(parts)


def listing(sweep: SweepConfig, members: Sequence[SweepMember]) -> str:
    """Return the members as lines of text, with what they will take, and the sum of it."""
    costs = [cost_of(sweep, member) for member in members]
    width = max(len(member.name) for member in members)
    currency = sweep.cost.currency
    lines = [f"{'member':{width}} {'steps':>9} {'FLOPs':>9} {'hours':>9} {currency:>10}"]
    for member, cost in zip(members, costs, strict=True):
        steps = "–" if member.total_steps is None else f"{member.total_steps:,}"
        lines.append(f"{member.name:{width}} {steps:>9} {_cells(cost)}")
    lines.append(f"{f'all {len(members)}':{width}} {'':>9} {_cells(total(costs))}")
    if len(sweep.members) > len(members):
        lines.append(members_given(sweep, members))
    if sweep.halving is not None:
        most = total_with_halving(sweep, members, costs)
        lines.append(f"{'at most, with halving':{width}} {'':>9} {_cells(most)}")
    if sweep.cost.flops_per_second is None:
        lines.append(
            "no hours: cost.flops_per_second is not set (perf/ in a run's log measures it)"
        )
    elif sweep.cost.price_per_hour is None:
        lines.append("no price: cost.price_per_hour is not set")
    return "\n".join(lines)


def _cells(cost: Cost) -> str:
    flops = "–" if cost.flops is None else f"{cost.flops:.2e}"
    hours = "–" if cost.hours is None else f"{cost.hours:,.2f}"
    price = "–" if cost.price is None else f"{cost.price:,.2f}"
    return f"{flops:>9} {hours:>9} {price:>10}"
