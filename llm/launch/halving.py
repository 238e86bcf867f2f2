"""Early stopping of hopeless runs by synchronous successive halving. Third floor, pure.

All runs go up to the first rung, the best of them up to the next, and so on: which go on follows
from their metric at the rung alone, not from which was faster.

Source: Jamieson and Talwalkar 2016, arXiv:1502.07943, algorithm 1. It divides a budget evenly among
rungs; here the rungs' steps are given, and a run goes on from its checkpoint, which is not counted
twice. The asynchronous form (Li et al. 2020, arXiv:1810.05934), which promotes before a rung is
full, depends on the order in which runs arrive and is not offered.
"""

import math
from collections.abc import Mapping, Sequence

from llm.launch.config import HalvingConfig


def num_kept(num_members: int, factor: int) -> int:
    """Return how many of the members at a rung go on: their number over the factor, at least 1.

    Where the paper rounds down, this rounds up.
    """
    return math.ceil(num_members / factor)


def keep_best(values: Mapping[str, float | None], factor: int, *, smallest: bool) -> list[str]:
    """Return the names of those that go on, the best first; equal ones by their order here.

    Without a finite metric none goes on beside one that has it.
    """
    bad = {name: badness(value, smallest=smallest) for name, value in values.items()}
    alive = sorted(values, key=bad.__getitem__)[: num_kept(len(values), factor)]
    return [name for name in alive if bad[name] < math.inf] or alive[:1]


def badness(value: float | None, *, smallest: bool) -> float:
    """Return what members are sorted by; of None (a member without the metric), NaN and infinities
    it is worse than of any number."""
    if value is None or not math.isfinite(value):
        return math.inf
    return value if smallest else -value


def members_by_rung(num_members: int, halving: HalvingConfig, total_steps: int) -> list[int]:
    """Return how many members run up to each rung, and in the end to the last step."""
    counts = [num_members]
    for _ in rungs(halving, total_steps):
        counts.append(num_kept(counts[-1], halving.factor))
    return counts


def rungs(halving: HalvingConfig | None, total_steps: int | None) -> Sequence[int]:
    """Return the steps at which members are compared, those past the end of a run left out."""
    steps = () if halving is None else halving.at_steps
    return [step for step in steps if total_steps is None or step < total_steps]
