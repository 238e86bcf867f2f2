"""Which runs belong to one compute budget, and what a budget needs for a minimum. Third floor."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from llm.scaling.runs import Runs, group_sizes

Variable = Literal["params", "tokens"]
Points = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]  # sizes, losses

LEAST_SIZES = 4  # three fix a parabola and leave nothing to judge it by


def assign_budgets(
    runs: Runs, budgets: Sequence[float] | None = None, *, tolerance: float = 0.1
) -> Int[np.ndarray, " R"]:
    """Return the number of each run's budget, -1 for none; budgets are numbered upwards.

    With `budgets`, the nearest that is within `tolerance`, relative. Without, budgets are found in
    the table: the window of FLOPs from (1 − tolerance) to (1 + tolerance) times its middle that
    holds the most runs is one budget, then the fullest window of the rest, and so on.
    """
    log_flops = np.log(runs.flops)
    low, high = np.log1p(-tolerance), np.log1p(tolerance)
    number = np.full(len(runs), -1)
    if budgets is not None:
        given = np.sort(np.log(np.asarray(budgets, float)))
        off = log_flops[:, None] - given
        nearest = np.abs(off).argmin(1)
        distance = off[np.arange(len(runs)), nearest]
        return np.where((distance >= low) & (distance <= high), nearest, -1)
    order = np.argsort(log_flops, kind="stable")
    free = np.ones(len(runs), bool)
    windows = []
    while free.any():
        rows = order[free[order]]
        ends = np.searchsorted(log_flops[rows], log_flops[rows] + (high - low) + 1e-9)
        first = int(np.argmax(ends - np.arange(len(rows))))
        members = rows[first : ends[first]]
        free[members] = False
        if len(members) > 1:
            windows.append(members)
    for i, members in enumerate(sorted(windows, key=lambda m: log_flops[m].mean())):
        number[members] = i
    return number


def sizes_of(runs: Runs, variable: Variable) -> Float[np.ndarray, " P"]:
    return runs.num_params if variable == "params" else runs.num_tokens


def unfit(sizes: Float[np.ndarray, " P"], loss: Float[np.ndarray, " P"]) -> str:
    """Return why a budget has no minimum to report, or nothing."""
    count = int(group_sizes(sizes).max()) + 1
    if count < LEAST_SIZES:
        return f"{count} sizes, {LEAST_SIZES} are needed"
    x = np.log(sizes) - np.log(sizes).mean()
    _, slope, bend = np.polynomial.polynomial.polyfit(x, loss, 2)
    if bend <= 0:
        return "its parabola opens downward"
    best = -slope / (2 * bend)
    if not x.min() <= best <= x.max():
        side = "below the smallest" if best < x.min() else "above the largest"
        return f"its minimum is {side} size that was run"
    return ""


def slope_of_optima(
    middles: Sequence[float],
    points: Sequence[Points],
) -> float:
    """Return how the least loss changes with log C, by the budgets that a parabola fits."""
    fitted = [
        (np.log(flops), min(loss))
        for flops, (sizes, loss) in zip(middles, points, strict=True)
        if not unfit(sizes, loss)
    ]
    if len(fitted) < 2:
        return 0.0
    return float(np.polyfit(*zip(*fitted, strict=True), 1)[0])


def move(runs: Runs, flops: float, variable: Variable, slope: float) -> Points:
    """Return sizes and losses as they would be at the budget, see `isoflop.fit_isoflop`."""
    away = np.log(flops / runs.flops)
    return sizes_of(runs, variable) * np.exp(away / 2), runs.loss + slope * away
