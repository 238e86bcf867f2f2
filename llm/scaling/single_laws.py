"""Single power laws L = (scale/x)^exponent, fitted to some of the rows of a table. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from llm.scaling.bootstrap import Estimate, estimate
from llm.scaling.runs import Runs, count_sizes

UNLIMITED = 0.02  # Kaplan's own threshold, section 4.2: no more loss than 2% for want of the other
_LEAST_POINTS = 3


@dataclasses.dataclass(frozen=True)
class SingleLaw:
    """L = (scale/x)^exponent, fitted to some of the rows; or why it was not."""

    name: str  # "L(N)", "L(D)", "L(C)"
    num_points: int
    scale: Estimate | None = None
    exponent: Estimate | None = None
    refused: str = ""


def fit_single(
    name: str,
    runs: Runs,
    chosen: Bool[np.ndarray, " R"],
    weights: Float[np.ndarray, "draws R"],
    level: float,
) -> SingleLaw:
    """Fit L(N) or L(D) to the chosen rows; the draws weight them."""
    sizes = (runs.num_params if name == "L(N)" else runs.num_tokens)[chosen]
    if count_sizes(sizes) < _LEAST_POINTS:
        other, what = ("data", "sizes") if name == "L(N)" else ("size", "amounts of tokens")
        return SingleLaw(
            name,
            int(chosen.sum()),
            refused=f"{chosen.sum()} of {len(runs)} rows lose at most {UNLIMITED:.0%} for want of "
            f"{other}, of {count_sizes(sizes)} {what}; "
            f"{_LEAST_POINTS} are needed",
        )
    x, y = np.log(sizes), np.log(runs.loss[chosen])
    drawn = [w for w in weights[:, chosen] if count_sizes(sizes[w > 0]) > 1]
    lines = [_line(x, y, w) for w in drawn]
    whole = _line(x, y, np.ones(len(x)))
    return _single(name, whole, np.array(lines).reshape(-1, 2), len(x), level)


def fit_frontier(runs: Runs, weights: Float[np.ndarray, "draws R"], level: float) -> SingleLaw:
    """Fit L(C) to the rows that no other row with as few FLOPs undercuts."""
    log_flops, log_loss = np.log(runs.flops), np.log(runs.loss)
    front = _frontier(log_flops, log_loss)
    if len(front) < _LEAST_POINTS:
        return SingleLaw(
            "L(C)",
            len(front),
            refused=f"{len(front)} rows are the best for their compute; {_LEAST_POINTS} are needed",
        )
    lines = []
    for w in weights:
        rows = np.flatnonzero(w)
        kept = rows[_frontier(log_flops[rows], log_loss[rows])]
        if len(kept) > 1:
            lines.append(_line(log_flops[kept], log_loss[kept], np.ones(len(kept))))
    line = _line(log_flops[front], log_loss[front], np.ones(len(front)))
    return _single("L(C)", line, np.array(lines).reshape(-1, 2), len(front), level)


def _frontier(x: Float[np.ndarray, " R"], y: Float[np.ndarray, " R"]) -> Int[np.ndarray, " _"]:
    """Return the rows whose y is below that of every row of no greater x."""
    order = np.lexsort((y, x))
    before = np.minimum.accumulate(np.append(np.inf, y[order]))[:-1]
    return order[y[order] < before]


def _line(
    x: Float[np.ndarray, " P"], y: Float[np.ndarray, " P"], weights: Float[np.ndarray, " P"]
) -> Float[np.ndarray, " 2"]:
    return np.polynomial.polynomial.polyfit(x, y, 1, w=np.sqrt(weights))


def _single(
    name: str,
    line: Float[np.ndarray, " 2"],
    lines: Float[np.ndarray, "draws 2"],
    count: int,
    level: float,
) -> SingleLaw:
    """Turn log L = c − α·x into (e^(c/α)/X)^α."""
    with np.errstate(all="ignore"):
        scales = np.exp(-lines[:, 0] / lines[:, 1])
    if not line[1] < 0 or np.sum(~(lines[:, 1] < 0)) > (1 - level) / 2 * len(lines):
        return SingleLaw(name, count, refused="the loss of these rows does not surely fall")
    good = lines[:, 1] < 0
    return SingleLaw(
        name,
        count,
        estimate(np.exp(-line[0] / line[1]), scales[good], level),
        estimate(-line[1], -lines[good, 1], level),
    )
