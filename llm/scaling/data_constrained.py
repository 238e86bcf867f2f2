"""Repeated data: the loss surface in effective tokens and parameters. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from llm.scaling.bootstrap import Estimate, Optimum, estimate, optimum_of, resample
from llm.scaling.design import check_surface_design
from llm.scaling.parametric import (
    StartReport,
    fit_from_starts,
    hoffmann_starts,
    lower_bounds,
    prediction_interval,
)
from llm.scaling.repeated_surface import LogRepeated, RepeatedSurface
from llm.scaling.robust import HUBER_DELTA, minimise
from llm.scaling.runs import NotIdentifiableError, Runs, count_sizes
from llm.scaling.surface import CONSTANTS, LossSurface

_REPEATED = 1.05  # epochs; fewer count as one pass
_LEAST_REPEATED = 5
_SCALES = (0.05, 1e3)  # of R*: below, a second pass is worth nothing; above, as much as new data


@dataclasses.dataclass(frozen=True)
class DataConstrainedFit:
    """The fitted surface, its bootstrap draws, and how the fit went."""

    surface: RepeatedSurface
    draws: RepeatedSurface
    level: float
    objective: float
    starts: StartReport
    log_residuals: Float[np.ndarray, " R"]
    unique_tokens: float  # of `optimum`
    notes: tuple[str, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Return every constant with its interval; R*_N only where the runs determine it."""
        base, drawn = self.surface.base, self.draws.base
        pairs = {name: (getattr(base, name), getattr(drawn, name)) for name in CONSTANTS}
        pairs["R_D_star"] = (self.surface.repeat_scale, self.draws.repeat_scale)
        if np.isfinite(self.surface.excess_scale):
            pairs["R_N_star"] = (self.surface.excess_scale, self.draws.excess_scale)
        return {name: estimate(*pair, self.level) for name, pair in pairs.items()}

    def optimum(self, flops: float) -> Optimum:
        """Return the optimal model for a budget where `unique_tokens` exist, found on a grid."""
        point = self.surface.optimum(flops, self.unique_tokens)
        each = [
            self.draws[i].optimum(flops, self.unique_tokens)
            for i in range(len(self.draws.repeat_scale))
        ]
        params, tokens, losses = np.array(each).reshape(-1, 3).T
        loss = estimate(point[2], losses, self.level)
        return optimum_of(flops, point[:2], (params, tokens), self.level, loss)

    def predict(
        self, runs: Runs, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
        """Return the loss predicted for each run and the ends of its prediction interval."""
        sizes = runs.num_params, runs.num_tokens, runs.unique_tokens
        count = len(self.estimates())
        return self.surface.loss(*sizes), *prediction_interval(
            self.draws.loss(*sizes), self.log_residuals, count, self.level, rng
        )


def fit_data_constrained(
    runs: Runs,
    *,
    unique_tokens: float = float("inf"),
    num_draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
    delta: float = HUBER_DELTA,
) -> DataConstrainedFit:
    """Fit E, A, B, α, β and the scales R*_D and R*_N of repetition, all at once.

    The start is the surface that fits the runs of one epoch, where they determine one, else that of
    all runs; from it and 16 pairs of scales the summed Huber loss of log loss is minimised.

    R*_N is left out, and N' = N, where fewer than 5 runs have more parameters than their unique
    tokens need, or where the resamples do not determine it; the notes say so.

    Args:
      unique_tokens: how many there are for `optimum`.

    Raises:
      NotIdentifiableError: the runs have no unique tokens, fewer than 5 repeat their data (1.05
        epochs or more) at 2 numbers of epochs, or an interval's end would lie at a limit: in more
        than half of (1 − level) of the draws R*_D is not between 0.05 and 1,000; and as for
        `parametric.fit_parametric`.

    Source: Muennighoff et al. 2023, arXiv:2305.16264, section 3. They take the five constants from
    runs of one epoch, with α = β, and fit the two scales after; all are free here, and the
    intervals are ours.
    """
    if runs.unique_tokens is None:
        raise NotIdentifiableError(
            "the table has no unique tokens (unique_tokens_column): without them a repeated token "
            "cannot be told from a new one"
        )
    epochs = runs.num_tokens / np.minimum(runs.unique_tokens, runs.num_tokens)
    repeated = epochs > _REPEATED
    if repeated.sum() < _LEAST_REPEATED or count_sizes(epochs[repeated]) < 2:
        raise NotIdentifiableError(
            f"{repeated.sum()} runs repeat their data, at {count_sizes(epochs[repeated])} numbers "
            f"of epochs: {_LEAST_REPEATED} runs at 2 numbers of epochs are needed to see what a "
            "repetition is worth"
        )
    check_surface_design(runs, num_constants=7)
    base = _base(runs, repeated, delta)
    unlimited = RepeatedSurface(base, np.asarray(1.0), np.asarray(1.0))
    params, _ = unlimited.effective(runs.num_params, runs.num_tokens, runs.unique_tokens)
    in_excess = int((params < 0.99 * runs.num_params).sum())
    try:
        if in_excess < _LEAST_REPEATED:
            raise _ExcessError(f"{in_excess} runs have more parameters than their data need")
        return _fit(runs, base, True, unique_tokens, num_draws, level, seed, delta)
    except _ExcessError as error:
        fit = _fit(runs, base, False, unique_tokens, num_draws, level, seed, delta)
        return dataclasses.replace(fit, notes=(*fit.notes, f"R*_N is left out: {error}"))


class _ExcessError(Exception):
    """R*_N alone cannot be told."""


def _base(runs: Runs, repeated: Bool[np.ndarray, " R"], delta: float) -> LossSurface:
    """Return the surface to start from."""
    single = runs.select(~repeated)
    try:
        check_surface_design(single)
    except NotIdentifiableError:
        single = runs
    minimum, law = fit_from_starts(single, hoffmann_starts(100), delta=delta)
    surface = law.surface(minimum.theta[[minimum.best]])[0]
    if not (surface.alpha > 0 and surface.beta > 0):
        raise NotIdentifiableError(
            f"the surface of {len(single)} runs has exponents {surface.alpha:.3g} and "
            f"{surface.beta:.3g}: the loss does not fall as a power law of both sizes"
        )
    return surface


def _fit(
    runs: Runs,
    base: LossSurface,
    excess: bool,
    unique_tokens: float,
    num_draws: int,
    level: float,
    seed: int,
    delta: float,
) -> DataConstrainedFit:
    law, log_loss = LogRepeated(runs, excess=excess), np.log(runs.loss)
    logs = np.array([[np.log(base.A), np.log(base.B), np.log(base.E), base.alpha, base.beta]])
    scales = np.log([1.0, 4.0, 16.0, 64.0])
    pairs = [(x, y) for x in scales for y in scales] if excess else [(x,) for x in scales]
    starts = np.array([[*law.inner.centred(logs)[0], *pair] for pair in pairs])
    lower = lower_bounds(log_loss, starts.shape[1])
    minimum = minimise(law, log_loss, starts, delta=delta, lower=lower)
    best = minimum.theta[[minimum.best]]
    surface = law.surface(best)
    if excess and not _inside(surface.excess_scale)[0]:
        raise _ExcessError("the best fit has it at a limit")
    if not _inside(surface.repeat_scale)[0] or not minimum.converged[minimum.best]:
        raise NotIdentifiableError(
            f"R*_D runs away to {surface.repeat_scale[0]:.3g}: in these runs a repeated token is "
            "worth as much as a new one, or nothing; add runs of more epochs, to 16 and beyond"
        )
    weights = resample(runs.run, num_draws, np.random.default_rng(seed))
    repeated = np.repeat(best, num_draws, axis=0)
    drawn = minimise(law, log_loss, repeated, weights, delta=delta, lower=lower)
    draws = law.surface(drawn.theta)
    most, notes = (1 - level) / 2, []
    if excess and num_draws and np.mean(~_inside(draws.excess_scale)) > most:
        raise _ExcessError("the resamples do not determine it")
    exponents = (draws.base.alpha > 0) & (draws.base.beta > 0)
    lost = ~(drawn.converged & exponents & _inside(draws.repeat_scale))
    lost |= excess & ~_inside(draws.excess_scale)
    if num_draws and lost.mean() > most:
        raise NotIdentifiableError(
            f"the law has no interval: in {lost.mean():.0%} of the resamples R*_D or a term runs "
            "away; add runs that repeat their data, and runs that do not"
        )
    if lost.any():
        notes.append(f"{lost.sum()} of {num_draws} resamples had no fit and were left out")
    report = StartReport(
        len(starts),
        int(minimum.arrived().sum()),
        int(minimum.converged.sum()),
        float(minimum.objective.max()),
    )
    return DataConstrainedFit(
        surface[0],
        draws[~lost],
        level,
        float(minimum.objective[minimum.best]),
        report,
        law.predict(best)[0] - log_loss,
        unique_tokens,
        tuple(notes),
    )


def _inside(scale: Float[np.ndarray, " S"]) -> Bool[np.ndarray, " S"]:
    return (scale > _SCALES[0]) & (scale < _SCALES[1])
