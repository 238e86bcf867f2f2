"""Mixtures of sources: which source, and which of its rows, is the n-th row of a run.
A pure function of n, so that one integer is the whole state of the data pipeline."""

import dataclasses
import fractions
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, Int64

# A schedule no longer than this is exact; shares needing a longer one are rounded to 1/16384.
MAX_PERIOD_ROWS = 2**14


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """A periodic schedule of sources in which every prefix holds each share to within one row."""

    names: tuple[str, ...]
    rows_per_period: Int64[np.ndarray, " sources"]
    source_at: Int64[np.ndarray, " period"]  # which source takes this place of the period
    earlier_at: Int64[np.ndarray, " period"]  # rows of that source earlier in the period

    @property
    def period(self) -> int:
        return len(self.source_at)

    def locate(
        self, rows: Int[np.ndarray, " B"]
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Return, for each global row index, its source and how many of its rows came before."""
        periods, place = np.divmod(np.asarray(rows, np.int64), self.period)
        source = self.source_at[place]
        return source, periods * self.rows_per_period[source] + self.earlier_at[place]

    def first_row_beyond(self, limits: Int[np.ndarray, " sources"]) -> int:
        """Return the first global row that asks some source for more rows than its limit."""
        firsts = []
        for source, limit in enumerate(np.asarray(limits, np.int64).tolist()):
            periods, earlier = divmod(limit, int(self.rows_per_period[source]))
            place = np.flatnonzero((self.source_at == source) & (self.earlier_at == earlier))[0]
            firsts.append(periods * self.period + int(place))
        return min(firsts)


def make_mixture(weights: Mapping[str, float]) -> Mixture:
    """Return the schedule that gives each source its share, weight ÷ sum of weights, of the rows.

    Row j of a source with share w has the window [⌊j/w⌋, ⌈(j+1)/w⌉) of global rows, and each
    place goes to the source whose window closes first. Since the shares sum to one every window
    is met, hence |rows of the source among the first n − n·w| < 1 for all n.

    Source: Baruah, Cohen, Plaxton, Varvel 1996, "Proportionate progress", for one processor.

    Raises:
      ValueError: no weight is positive, one is negative or not finite, or one is too small.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight of source {name!r} is {weight}; it must be a number ≥ 0")
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    if not positive:
        raise ValueError(f"no source has a positive weight: {dict(weights)}; set at least one")
    counts = _whole_shares(positive)
    period = sum(counts)
    taken = [0] * len(counts)
    source_at, earlier_at = [], []
    for place in range(period):
        _, source = min(
            (-(-(taken[s] + 1) * period // count), s)  # ⌈(j+1)/w⌉
            for s, count in enumerate(counts)
            if taken[s] * period // count <= place  # ⌊j/w⌋
        )
        source_at.append(source)
        earlier_at.append(taken[source])
        taken[source] += 1
    return Mixture(tuple(positive), np.array(counts), np.array(source_at), np.array(earlier_at))


def _whole_shares(weights: Mapping[str, float]) -> list[int]:
    """Return the smallest whole numbers in proportion to the weights, rounded if they are large."""
    # Through the decimal that was typed: 0.3 means 3/10, not the nearest binary fraction.
    exact = [fractions.Fraction(repr(float(weight))) for weight in weights.values()]
    scale = math.lcm(*(share.denominator for share in exact))
    counts = [int(share * scale) for share in exact]
    counts = [count // math.gcd(*counts) for count in counts]
    total = sum(counts)
    if total <= MAX_PERIOD_ROWS:
        return counts
    # Largest remainders: the rounded shares still sum to one period.
    rounded = [count * MAX_PERIOD_ROWS // total for count in counts]
    remainders = [-(count * MAX_PERIOD_ROWS % total) for count in counts]
    for index in sorted(range(len(counts)), key=remainders.__getitem__)[
        : MAX_PERIOD_ROWS - sum(rounded)
    ]:
        rounded[index] += 1
    for name, count in zip(weights, rounded, strict=True):
        if count == 0:
            raise ValueError(
                f"weight of source {name!r} is {weights[name]}, less than 1/{MAX_PERIOD_ROWS} of "
                f"all weights {dict(weights)}; raise it, or set it to 0 to leave the source out"
            )
    return rounded
