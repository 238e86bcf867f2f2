"""Where a curve changes, with an interval, and whether it changes at all. Third floor.

A curve is a score over log size, log compute or log steps, measured with several seeds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float

from llm.scaling.bootstrap import Estimate
from llm.scaling.curve_shapes import Changes, Shapes, change_shapes, flat_stretch, smooth_shapes
from llm.scaling.runs import NotIdentifiableError

_LEAST_PLACES = 5  # a knee has four constants
_LEAST_PLACES_ALONE = 8  # with one seed they must give the noise as well
_CONSTANTS = 4  # of a knee or a step
_ROUNDING = 1e-12  # of a curve's sum of squares: below it there is no noise

Verdict = Literal["line", "bend", "change"]


@dataclasses.dataclass(frozen=True)
class ChangePoint:
    """What was found. `position` is None unless the verdict is "change".

    An end of its interval is infinite where the interval reaches the end of the data.
    """

    verdict: Verdict
    shape: Literal["knee", "step"]  # the better of the two: a change of slope, or of level
    position: Estimate | None
    p_values: Mapping[str, float]  # of each smooth family, see `find_change_point`
    p_misfit: float  # of the better shape; NaN with one seed
    x: Float[np.ndarray, " X"]
    means: Float[np.ndarray, " X"]  # over seeds
    change_fit: Float[np.ndarray, " X"]
    smooth_fit: Float[np.ndarray, " X"]  # of the best smooth family
    level: float
    false_alarm_rate: float
    notes: tuple[str, ...]

    @property
    def found(self) -> bool:
        return self.verdict == "change"

    def describe(self, name: str = "x", unit: Callable[[float], float] = float) -> str:
        """Return the result in a line: `unit` undoes what x is of, np.exp where it is a log."""
        if self.position is None:
            what = {"line": "a line is enough", "bend": "a smooth bend explains it as well"}
            worst = max(self.p_values.values())
            return f"no change point: {what[self.verdict]} (p = {worst:.3g})"
        low, high = (_number(end, unit) for end in (self.position.low, self.position.high))
        where = f"{self.shape} at {name} = {_number(self.position.value, unit)}"
        if low is None and high is None:
            return f"{where}, but the {self.level:.0%} interval spans all the data"
        low = low or "the start of the data"
        high = high or "the end of the data"
        return f"{where} ({self.level:.0%}: {low} to {high})"


def find_change_point(
    x: Float[np.ndarray, " X"],
    y: Float[np.ndarray, "X S"],
    *,
    joint: bool = False,
    smooth: Sequence[str] = ("cubic", "sigmoid"),
    widest_step: float = 0.5,
    false_alarm_rate: float = 0.05,
    level: float = 0.95,
    num_draws: int = 500,
    num_positions: int = 201,
    seed: int = 0,
) -> ChangePoint:
    """Look for one knee or step in a curve, and say whether a smooth curve explains it as well.

    By least squares over a grid of positions: a broken stick (continuous, two slopes) and a
    logistic step of at most `widest_step`; the better of the two is the change. It counts only if
    every smooth family is rejected: with W = n·(SSR_smooth − SSR_change)/SSR_change, the p-value of
    a family is the share of curves drawn from its own best fit, with the noise of the seeds, that
    give as large a W. Since all must be rejected, the rate of false alarms is at most
    `false_alarm_rate` whichever of the families is true (an intersection-union test). The verdict
    is "line" where a straight line is not rejected, "bend" where a line is but another smooth curve
    is not, else "change". `smooth=("line",)` is the textbook test of a broken stick, which takes
    every well-measured smooth bend for a knee.

    The interval holds the positions τ with n·(SSR(τ) − SSR)/SSR up to its quantile in curves drawn
    from the change itself, and no less than χ²'s; SSR(τ) is the better of both shapes, so that a
    doubt about the shape widens it; one step of the grid is added at either end. An end is infinite
    where it reaches the second place or the last but one, beyond which nothing was looked for.

    Draws resample, within each place, the seeds' deviations from their mean, widened by √(S/(S−1));
    with `joint` whole seeds, for a curve whose points come from one run each, as over steps; where
    some place has one seed only, the residuals of all places, widened by √(n/(n−4)).

    Measured with 400 curves each, range 1 of y, noise 0.05, level 0.95, rate 0.05 (see the tests):
    TABLE

    Args:
      x: places, increasing; a logarithm where sizes or compute grow by factors.
      y: scores of S seeds; NaN where one is missing. In a scale in which scaling is smooth: nats as
        their logarithm, accuracies as they are.

    Raises:
      NotIdentifiableError: there are fewer than 5 places, or 8 where one has a single seed; or
        `joint` with a missing score.
      ValueError: x does not increase, a place has no score, or a score is infinite.

    Source: Hansen 2017, doi:10.1080/07350015.2015.1073595, sections 3 and 4 and the author's
    program: W, its bootstrap, and the interval by inverting it. Broken sticks by profile: Hudson
    1966, Lerman 1980, doi:10.2307/2346413; Muggeo 2003, doi:10.1002/sim.1545, climbs to the same
    optimum. A null that is not nested: Cox 1962; Williams 1970, doi:10.2307/2528945. Different from
    Hansen: residuals are resampled within seeds and not multiplied, steps and smooth bends.
    """
    curve = _Curve.of(x, y, joint)
    rng = np.random.default_rng(seed)
    changes = change_shapes(
        x, curve.weights, widest_step=widest_step, num_positions=num_positions
    )
    families = {
        family: smooth_shapes(family, x, curve.weights, widest_step=widest_step)
        for family in dict.fromkeys(("line", *smooth))
    }
    knees, steps = (curve.within + profile[:, 0] for profile in changes.profiles(curve.means[None]))
    profile = np.minimum(knees, steps)
    rest = profile.min() + curve.rounding
    shape = "knee" if knees.min() <= steps.min() else "step"
    change_fit = (changes.knees if shape == "knee" else changes.steps).best(curve.means)

    noise, noise_within = curve.draw_noise(change_fit, num_draws, rng)
    p_values, smooth_fits = {}, []
    for family, shapes in families.items():
        gain = curve.within + shapes.left_over(curve.means[None])[:, 0].min() - rest
        fitted = shapes.best(curve.means)
        drawn_gain, drawn_rest = _gains(shapes, changes, fitted + noise, noise_within)
        as_large = drawn_gain * rest >= gain * drawn_rest
        p_values[family] = (1 + as_large.sum()) / (1 + num_draws) if gain > 0 else 1.0
        smooth_fits.append((gain, fitted))
    verdict = _verdict(p_values, false_alarm_rate)

    drawn = np.minimum(*changes.profiles(change_fit + noise)) + noise_within
    stretch = flat_stretch(profile, curve.rounding)
    chosen = int(stretch[len(stretch) // 2])
    position = None
    if verdict == "change":
        excess = curve.count * (drawn[chosen] / (drawn.min(0) + curve.rounding) - 1)
        limit = max(np.quantile(excess, level), NormalDist().inv_cdf((1 + level) / 2) ** 2)
        inside = np.flatnonzero(curve.count * (profile / rest - 1) <= limit)
        position = _interval(changes.positions, chosen, inside)
    p_misfit = float("nan")
    if not curve.single:
        p_misfit = _p_misfit(curve, rest, drawn.min(0), noise_within)
    return ChangePoint(
        verdict,
        shape,
        position,
        {family: float(p) for family, p in p_values.items()},
        p_misfit,
        x,
        curve.means,
        change_fit,
        min(smooth_fits, key=lambda pair: pair[0])[1],
        level,
        false_alarm_rate,
        _notes(curve, p_misfit, verdict, false_alarm_rate),
    )


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A curve's means, and the noise of its seeds."""

    means: Float[np.ndarray, " X"]
    weights: Float[np.ndarray, " X"]  # seeds of each place
    deviations: tuple[Float[np.ndarray, " _"], ...]  # from the mean of each place
    within: float  # their sum of squares
    joint: bool

    @classmethod
    def of(
        cls, x: Float[np.ndarray, " X"], y: Float[np.ndarray, "X S"], joint: bool
    ) -> "_Curve":
        present = ~np.isnan(y)
        counts = present.sum(1)
        if (np.diff(x) <= 0).any() or not np.isfinite(x).all():
            raise ValueError("x must be finite and increase from place to place")
        if not counts.all() or np.isinf(y).any():
            bad = x[(counts == 0) | np.isinf(y).any(1)][0]
            raise ValueError(f"x = {bad:g} has no score, or an infinite one")
        least = _LEAST_PLACES if counts.min() > 1 else _LEAST_PLACES_ALONE
        if len(x) < least:
            each = "2 seeds or more" if counts.min() > 1 else "a single seed at some"
            raise NotIdentifiableError(
                f"{len(x)} places with {each}: a change point needs {least}, or "
                f"{_LEAST_PLACES} with 2 seeds each; add sizes (or steps) between these"
            )
        if joint and not present.all():
            raise NotIdentifiableError(
                f"{(~present).sum()} scores are missing: seeds that are drawn as a whole need all"
            )
        means = np.nansum(y, 1) / counts
        deviations = tuple(row[row == row] - m for row, m in zip(y, means, strict=True))
        within = float(sum((row**2).sum() for row in deviations))
        return cls(means, counts.astype(float), deviations, within, joint)

    @property
    def count(self) -> int:
        return int(self.weights.sum())

    @property
    def single(self) -> bool:
        return bool(self.weights.min() == 1)

    @property
    def rounding(self) -> float:
        return _ROUNDING * float(self.within + self.weights @ self.means**2) + 1e-300

    def draw_noise(
        self, fitted: Float[np.ndarray, " X"], num_draws: int, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "draws X"], Float[np.ndarray, " draws"]]:
        """Return noise of the means, and sums of squares within places."""
        rows = self.deviations
        if self.single:
            off = (self.means - fitted).repeat(self.weights.astype(int)) + np.concatenate(rows)
            pool = (off - off.mean()) * np.sqrt(self.count / (self.count - _CONSTANTS))
            drawn = [rng.choice(pool, (num_draws, len(row))) for row in rows]
        else:
            wide = [row * np.sqrt(len(row) / (len(row) - 1)) for row in rows]
            picked = rng.integers(len(rows[0]), size=(num_draws, len(rows[0])))
            drawn = [
                row[picked if self.joint else rng.integers(len(row), size=(num_draws, len(row)))]
                for row in wide
            ]
        means = np.stack([each.mean(1) for each in drawn], 1)
        return means, np.sum([each.var(1) * each.shape[1] for each in drawn], 0)


def _gains(
    shapes: Shapes,
    changes: Changes,
    means: Float[np.ndarray, "draws X"],
    within: Float[np.ndarray, " draws"],
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """Return what the best change explains more than the best smooth shape, and what it leaves."""
    rest = np.minimum(*changes.profiles(means)).min(0)
    return shapes.left_over(means).min(0) - rest, rest + within + 1e-300


def _verdict(p_values: Mapping[str, float], rate: float) -> Verdict:
    if p_values["line"] > rate:
        return "line"
    return "bend" if max(p_values.values()) > rate else "change"


def _interval(
    positions: Float[np.ndarray, " T"], chosen: int, inside: Float[np.ndarray, " _"]
) -> Estimate:
    first, last = int(inside[0]) - 1, int(inside[-1]) + 1
    low = float(positions[first]) if first >= 0 else -np.inf
    high = float(positions[last]) if last < len(positions) else np.inf
    return Estimate(float(positions[chosen]), low, high)


def _p_misfit(
    curve: _Curve,
    rest: float,
    drawn_rest: Float[np.ndarray, " draws"],
    drawn_within: Float[np.ndarray, " draws"],
) -> float:
    """Return how often the noise of the seeds alone leaves as much beside the best change."""
    drawn = (drawn_rest - drawn_within) * (curve.within + curve.rounding)
    as_large = drawn >= (rest - curve.rounding - curve.within) * (drawn_within + curve.rounding)
    return float((1 + as_large.sum()) / (1 + len(drawn_rest)))


def _notes(curve: _Curve, p_misfit: float, verdict: Verdict, rate: float) -> tuple[str, ...]:
    notes = []
    if curve.single:
        notes.append(
            "some place has one seed: noise is taken from the residuals, as alike and independent "
            "at all places"
        )
    if verdict == "change" and p_misfit <= rate:
        notes.append(
            f"neither a knee nor a step fits within the noise of the seeds (p = {p_misfit:.3g}): "
            "the position is that of the nearer one"
        )
    return tuple(notes)


def _number(value: float, unit: Callable[[float], float]) -> str | None:
    return f"{unit(value):.3g}" if np.isfinite(value) else None
