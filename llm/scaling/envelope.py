"""The envelope of training curves: which model is best after so many FLOPs. Third floor.

The first approach of Hoffmann et al. 2022.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from llm.scaling.bootstrap import Estimate, Optimum, estimate, optimum_of
from llm.scaling.design import check_loss_falls, check_sizes
from llm.scaling.held_out import HeldOut
from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN, NotIdentifiableError, Runs, group_sizes

_GRID_POINTS = 1500  # Hoffmann et al. 2022
_LEAST_ON_ENVELOPE = 3  # models
_MOST_LOST = 0.1  # of the resamples
_FLAT = 1e-6  # an exponent that is 0 but for rounding


@dataclasses.dataclass(frozen=True)
class Curve:
    """The loss of one model in the course of training; tokens ascend."""

    num_params: float
    flops: Float[np.ndarray, " P"]
    loss: Float[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True)
class EnvelopeFit:
    """The best model at each FLOP value, and the power law N = coefficient · C^exponent."""

    curves: tuple[Curve, ...]
    flops: Float[np.ndarray, " X"]  # where the best model is not the smallest or largest at hand
    best: Int[np.ndarray, " X"]  # the curve
    loss: Float[np.ndarray, " X"]
    num_censored: int  # FLOP values at which it is
    line: Float[np.ndarray, " 2"]  # log coefficient, exponent
    lines: Float[np.ndarray, "draws 2"]
    level: float
    notes: tuple[str, ...]

    @property
    def num_params(self) -> Float[np.ndarray, " X"]:
        return np.array([self.curves[i].num_params for i in self.best])

    def estimates(self) -> dict[str, Estimate]:
        """Return the exponents of the compute-optimal parameters and tokens, which add up to 1."""
        return {
            "params_exponent": estimate(self.line[1], self.lines[:, 1], self.level),
            "tokens_exponent": estimate(1 - self.line[1], 1 - self.lines[:, 1], self.level),
        }

    def params_at(self, flops: float) -> tuple[float, Float[np.ndarray, " draws"]]:
        """Return the best number of parameters for a budget, and its draws."""
        at = np.array([1.0, np.log(flops)])
        return float(np.exp(self.line @ at)), np.exp(self.lines @ at)

    def optimum(self, flops: float) -> Optimum:
        """Return the compute-optimal model for a budget; its tokens are C/6N."""
        value, draws = self.params_at(flops)
        tokens, tokens_draws = (flops / (FLOPS_PER_PARAM_TOKEN * x) for x in (value, draws))
        return optimum_of(flops, (value, tokens), (draws, tokens_draws), self.level)


def training_curves(runs: Runs) -> tuple[Curve, ...]:
    """Return the curves of a table: rows of one run, or of one size where rows are not numbered.

    Curves of one point are left out: they say nothing of the loss on the way.
    """
    numbered = len(np.unique(runs.run)) < len(runs)
    group = runs.run if numbered else group_sizes(runs.num_params)
    curves = []
    for number in np.unique(group):
        rows = runs.select(group == number)
        order = np.argsort(rows.flops, kind="stable")
        flops, first = np.unique(rows.flops[order], return_index=True)
        if len(flops) > 1:
            size = float(np.exp(np.log(rows.num_params).mean()))
            least = np.minimum.reduceat(rows.loss[order], first)
            curves.append(Curve(size, flops, least))
    return tuple(sorted(curves, key=lambda curve: curve.num_params))


def fit_envelope(
    runs: Runs, *, num_draws: int = 500, level: float = 0.95, seed: int = 0
) -> EnvelopeFit:
    """Find the model of least loss at 1,500 FLOP values and fit a power law to its size.

    Between the points of a curve log loss is linear in log FLOPs; beyond its ends a curve says
    nothing. FLOP values at which the best model is the smallest or largest of those with a loss
    there are left out: the best could be smaller or larger still. Where sizes were trained several
    times, the better counts at each FLOP value.

    The draws resample whole models, for the grid of sizes is what makes the envelope uncertain.

    The points of a curve should be ends of finished learning rate schedules. On the way of a longer
    schedule the loss is higher than it need be, which makes small models look better than they are;
    Hoffmann et al. trained each size with four lengths of schedule for this reason.

    Raises:
      NotIdentifiableError: there are fewer than 3 sizes with 2 points each, fewer than 3 models are
        ever the best between two others, more than a tenth of the resamples has no envelope, or
        the interval of the size's exponent reaches 0.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.1. Leaving out the ends and the
    intervals are ours.
    """
    check_loss_falls(runs)
    curves = training_curves(runs)
    check_sizes("sizes of model with a training curve (2 points or more)", _count_sizes(curves))
    low = min(curve.flops[0] for curve in curves)
    high = max(curve.flops[-1] for curve in curves)
    grid = np.geomspace(low, high, _GRID_POINTS)
    losses = np.stack([_interpolate(curve, grid) for curve in curves])
    sizes = np.log([curve.num_params for curve in curves])
    best, inner = _envelope(losses, sizes, np.ones(len(curves), bool))
    different = len(np.unique(group_sizes(np.exp(sizes))[best[inner]])) if inner.any() else 0
    if different < _LEAST_ON_ENVELOPE:
        raise NotIdentifiableError(
            f"{different} models are the best at some compute between a smaller and a larger one, "
            f"{_LEAST_ON_ENVELOPE} at least are needed: the curves must overlap in FLOPs and cross;"
            " train more sizes, the small ones longer"
        )
    log_flops = np.log(grid)
    line = _line(log_flops[inner], sizes[best[inner]])
    rng = np.random.default_rng(seed)
    lines, lost = [], 0
    for _ in range(num_draws):
        drawn = np.zeros(len(curves), bool)
        drawn[rng.integers(len(curves), size=len(curves))] = True
        chosen, within = _envelope(losses, sizes, drawn)
        if len(np.unique(chosen[within])) < 2:
            lost += 1
            continue
        lines.append(_line(log_flops[within], sizes[chosen[within]]))
    if lost > _MOST_LOST * num_draws:
        raise NotIdentifiableError(
            f"{lost / num_draws:.0%} of the resamples have no envelope of two models: the exponent "
            "hangs on single models; train more sizes"
        )
    flat = sum(slope < _FLAT for _, slope in lines)
    if flat > (1 - level) / 2 * len(lines):
        raise NotIdentifiableError(
            f"in {flat / len(lines):.0%} of the resamples the best size does not grow with compute:"
            " the interval of its exponent has no lower end; train more sizes, the small ones "
            "longer"
        )
    notes = [f"{lost} of {num_draws} resamples had no envelope and were left out"] if lost else []
    return EnvelopeFit(
        curves,
        grid[inner],
        best[inner],
        losses[best, np.arange(len(grid))][inner],
        int((~inner).sum()),
        line,
        np.array(lines).reshape(-1, 2),
        level,
        tuple(notes),
    )


def hold_out_envelope(runs: Runs, *, fraction: float, level: float = 0.95, **options) -> HeldOut:
    """Foretell the best size at the largest FLOP values from the envelope of the smaller ones.

    Held out are the upper `fraction` of the envelope's range in log FLOPs; the rows of more FLOPs
    are not seen by the fit. Measured is the envelope of all rows, at 20 values.

    Raises:
      NotIdentifiableError: the smaller rows have no envelope.
    """
    whole = fit_envelope(runs, level=level, **options)
    log_low, log_high = np.log(whole.flops[[0, -1]])
    threshold = np.exp(log_high - fraction * (log_high - log_low))
    smaller = runs.select(runs.flops <= threshold)
    try:
        law = fit_envelope(smaller, level=level, **options)
    except NotIdentifiableError as error:
        raise NotIdentifiableError(f"below {threshold:.3g} FLOPs: {error}") from error
    beyond = np.flatnonzero(whole.flops > threshold)
    beyond = beyond[np.linspace(0, len(beyond) - 1, min(20, len(beyond))).astype(int)]
    rows = []
    for i in beyond:
        value, draws = law.params_at(whole.flops[i])
        found = estimate(value, draws, level)
        rows.append((whole.flops[i], whole.num_params[i], value, found.low, found.high))
    flops, measured, predicted, lower, upper = (np.array(x) for x in zip(*rows, strict=True))
    return HeldOut(
        "optimal parameters",
        flops,
        measured,
        predicted,
        lower,
        upper,
        len(smaller),
        float(smaller.flops.max()),
        level,
    )


def _count_sizes(curves: tuple[Curve, ...]) -> int:
    sizes = np.array([curve.num_params for curve in curves], float)
    return int(group_sizes(sizes).max(initial=-1)) + 1


def _interpolate(curve: Curve, grid: Float[np.ndarray, " X"]) -> Float[np.ndarray, " X"]:
    """Return a curve's loss at FLOP values, infinite beyond its ends."""
    outside = np.inf
    log_loss = np.interp(
        np.log(grid), np.log(curve.flops), np.log(curve.loss), left=outside, right=outside
    )
    return np.exp(log_loss)


def _envelope(
    losses: Float[np.ndarray, "curves X"],
    sizes: Float[np.ndarray, " curves"],
    drawn: Bool[np.ndarray, " curves"],
) -> tuple[Int[np.ndarray, " X"], Bool[np.ndarray, " X"]]:
    """Return the best curve at each FLOP value, and whether smaller and larger ones had a loss."""
    losses = np.where(drawn[:, None], losses, np.inf)
    known = np.isfinite(losses)
    best = losses.argmin(0)
    smallest = np.where(known, sizes[:, None], np.inf).min(0)
    largest = np.where(known, sizes[:, None], -np.inf).max(0)
    inner = known.any(0) & (sizes[best] > smallest + 0.01) & (sizes[best] < largest - 0.01)
    return best, inner


def _line(x: Float[np.ndarray, " X"], y: Float[np.ndarray, " X"]) -> Float[np.ndarray, " 2"]:
    return np.polynomial.polynomial.polyfit(x, y, 1)
