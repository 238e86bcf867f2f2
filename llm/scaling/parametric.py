"""Fit L = E + A/N^α + B/D^β to runs, the third approach of Hoffmann et al. 2022. Third floor."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from llm.scaling.bootstrap import Estimate, Optimum, estimate, optimum_of, resample
from llm.scaling.design import check_surface_design
from llm.scaling.robust import HUBER_DELTA, Minimum, minimise
from llm.scaling.runs import NotIdentifiableError, Runs
from llm.scaling.surface import CONSTANTS, LogSurface, LossSurface

ALL_STARTS = 4500
Outliers = int | Literal["none", "auto"] | tuple[Literal["highest"], int]

_START_ROWS = 150_000  # starts times rows of the default: seconds
_VANISHING = 14.0  # a term below e^-14 of the least loss, a millionth, counts as gone
# Below, a term hardly changes over a table (10% over two decades) and cannot be told from E;
# above, it is a step at the smallest size.
_EXPONENTS = (0.02, 3.0)
_ROBUST_DEVIATIONS = 5.0  # of the residual of log loss, for outliers="auto"
_NORMAL_MAD = 1.4826  # standard deviations in a median absolute deviation, for normal noise


@dataclasses.dataclass(frozen=True)
class StartReport:
    """How many starts there were, and how many of them ended at the least objective of all."""

    count: int
    arrived: int
    converged: int
    worst: float  # the greatest objective that any ended at


@dataclasses.dataclass(frozen=True)
class ParametricFit:
    """The fitted surface, its bootstrap draws, and how the fit went."""

    surface: LossSurface
    draws: LossSurface
    level: float
    objective: float  # summed Huber loss of log loss
    starts: StartReport
    log_residuals: Float[np.ndarray, " kept"]  # predicted less measured
    kept: Bool[np.ndarray, " R"]  # False: an outlier
    notes: tuple[str, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Return every constant, and the exponents of the optimum, with their intervals."""
        found = {
            name: estimate(getattr(self.surface, name), getattr(self.draws, name), self.level)
            for name in CONSTANTS
        }
        exponent = self.surface.params_exponent, self.draws.params_exponent
        found["params_exponent"] = estimate(*exponent, self.level)
        found["tokens_exponent"] = estimate(1 - exponent[0], 1 - exponent[1], self.level)
        return found

    def optimum(self, flops: float) -> Optimum:
        """Return the compute-optimal model for a budget, with intervals."""
        point, draws = self.surface.optimum(flops), self.draws.optimum(flops)
        loss = estimate(self.surface.loss_each(*point), self.draws.loss_each(*draws), self.level)
        return optimum_of(flops, point, draws, self.level, loss)

    def predict(
        self, runs: Runs, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
        """Return the loss predicted for each run and the ends of its prediction interval.

        The interval holds both doubts: of the constants (a draw) and of the run itself (a residual
        of the fit, drawn anew, widened by √(R/(R−5)) for the constants that were fitted to them).
        """
        sizes = runs.num_params, runs.num_tokens
        draws = self.draws.loss(*sizes)
        ends = prediction_interval(draws, self.log_residuals, 5, self.level, rng)
        return self.surface.loss(*sizes), *ends


def prediction_interval(
    draws: Float[np.ndarray, "draws R"],
    log_residuals: Float[np.ndarray, " kept"],
    num_constants: int,
    level: float,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Return the ends of each run's prediction interval, NaN without draws.

    See `ParametricFit.predict`.
    """
    kept = len(log_residuals)
    if not len(draws):
        nothing = np.full(draws.shape[1], np.nan)
        return nothing, nothing
    widened = log_residuals * np.sqrt(kept / max(kept - num_constants, 1))
    noisy = draws * np.exp(-rng.choice(widened, draws.shape))
    low, high = np.quantile(noisy, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def hoffmann_starts(count: int = ALL_STARTS) -> Float[np.ndarray, "S 5"]:
    """Return the starts (a, b, e, α, β) of the paper: all 4,500, or `count` of them, the same ones.

    α, β ∈ {0, 0.5, …, 2}, e ∈ {−1, −0.5, …, 1}, a, b ∈ {0, 5, …, 25}.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, appendix D.3.
    """
    amplitudes, exponents = np.arange(0.0, 26.0, 5.0), np.arange(0.0, 2.1, 0.5)
    axes = (amplitudes, amplitudes, np.arange(-1.0, 1.1, 0.5), exponents, exponents)
    starts = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], -1)
    if count >= len(starts):
        return starts
    return starts[np.sort(np.random.default_rng(0).permutation(len(starts))[:count])]


def default_starts(num_runs: int) -> Float[np.ndarray, "S 5"]:
    """Return 500 of the paper's starts, fewer (20 at least) where that would take minutes."""
    return hoffmann_starts(int(np.clip(_START_ROWS // max(num_runs, 1), 20, 500)))


def fit_from_starts(
    runs: Runs, starts: Float[np.ndarray, "S 5"], *, delta: float = HUBER_DELTA
) -> tuple[Minimum, LogSurface]:
    """Minimise from every start (a, b, e, α, β); none is left out or moved beforehand.

    A term may not fall below a millionth of the least loss: one that starts there (a = 0, α = 2 is
    10⁻¹⁶) is first raised to that, where its slope can still be felt.
    """
    law, log_loss = LogSurface(runs.num_params, runs.num_tokens), np.log(runs.loss)
    lower = lower_bounds(log_loss)
    return minimise(law, log_loss, law.centred(starts), delta=delta, lower=lower), law


def fit_parametric(
    runs: Runs,
    *,
    num_draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
    delta: float = HUBER_DELTA,
    outliers: Outliers = "none",
    starts: Float[np.ndarray, "S 5"] | None = None,
) -> ParametricFit:
    """Fit E, A, B, α and β to the runs, each with its bootstrap interval.

    Minimises the sum of Huber_δ(LSE(a − α·log N, b − β·log D, e) − log L) with the analytic
    gradient, from every start of a grid, until the gradient vanishes. The best end is the fit. The
    draws are fits to resampled runs (`bootstrap.resample`), begun at the fit. Of 90% intervals made
    so 91 to 96% held the truth, in 150 tables of each of four designs of 36 to 100 rows with α ≠ β,
    off-centre grids and 0.3 to 0.5% of noise; on 8 to 30 rows they are wider than they need be.

    Outliers: none are dropped unless asked, since the Huber loss bounds what one row can do.
    "auto": after a first fit, those whose log loss lies more than 5 robust standard deviations
    (1.4826 times the median absolute residual) off; an int n: the n farthest off; ("highest", n):
    the n of highest loss, the rule of Besiroglu et al. for their table (n = 5). Refitted once.

    Args:
      starts: rows (a, b, e, α, β); default: 500 of the paper's 4,500, fewer for long tables.

    Raises:
      NotIdentifiableError: the design cannot tell the constants apart (`check_surface_design`), the
        best start did not converge, or an end of an interval would lie at a limit: in more than
        half of (1 − level) of the draws an exponent is not between 0.02 and 3 or a term is gone.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 2–4, appendix D.3; Besiroglu et al. 2024,
    arXiv:2404.10102. They run L-BFGS and BFGS from the grid; the objective and the optimum are the
    same, the minimiser is ours (`robust.minimise`).
    """
    check_surface_design(runs)
    starts = default_starts(len(runs)) if starts is None else starts
    kept = np.ones(len(runs), bool)
    minimum, law = fit_from_starts(runs, starts, delta=delta)
    notes = []
    if outliers != "none":
        kept = ~_find_outliers(runs, law.predict(minimum.theta[[minimum.best]])[0], outliers)
        dropped = runs.select(~kept)
        rows = ", ".join(map(str, dropped.row)) or "none"
        notes.append(f"outliers left out (rule {outliers}): {len(dropped)}; rows {rows}")
        if len(dropped):
            check_surface_design(runs.select(kept))
            minimum, law = fit_from_starts(runs.select(kept), starts, delta=delta)
    fitted = runs.select(kept)
    log_loss, best = np.log(fitted.loss), minimum.theta[[minimum.best]]
    if not minimum.converged[minimum.best]:
        raise NotIdentifiableError(
            f"the best start did not reach a vanishing gradient (relative: "
            f"{minimum.gradient[minimum.best]:.1e}): the objective is flat, as with a term too many"
        )
    surface = law.surface(best)[0]
    _check_point(law, best, log_loss)
    rng = np.random.default_rng(seed)
    draws = LossSurface(*(np.zeros(0) for _ in CONSTANTS))
    if num_draws:
        weights = resample(fitted.run, num_draws, rng)
        drawn = minimise(
            law,
            log_loss,
            np.repeat(best, num_draws, axis=0),
            weights,
            delta=delta,
            lower=lower_bounds(log_loss),
        )
        lost = ~drawn.converged | _runaway(law, drawn.theta, log_loss)
        _check_draws(law, drawn.theta, log_loss, drawn.converged, level)
        draws = law.surface(drawn.theta[~lost])
        if lost.any():
            notes.append(f"{lost.sum()} of {num_draws} resamples had no fit and were left out")
        at_zero = np.mean(drawn.theta[:, 2] <= lower_bounds(log_loss)[2] + 1e-6)
        if at_zero > (1 - level) / 2:
            notes.append(f"E cannot be told from 0: it is 0 in {at_zero:.0%} of the resamples")
    arrived = minimum.arrived()
    report = StartReport(
        len(starts),
        int(arrived.sum()),
        int(minimum.converged.sum()),
        float(minimum.objective.max()),
    )
    residuals = law.predict(best)[0] - log_loss
    objective = float(minimum.objective[minimum.best])
    return ParametricFit(surface, draws, level, objective, report, residuals, kept, tuple(notes))


def lower_bounds(
    log_loss: Float[np.ndarray, " R"], num_constants: int = 5
) -> Float[np.ndarray, " K"]:
    """Return the bounds of (a, b, e, …): a term is at least a millionth of the least loss."""
    floor = float(log_loss.min()) - _VANISHING
    return np.array([floor] * 3 + [-np.inf] * (num_constants - 3))


def _find_outliers(
    runs: Runs, predicted: Float[np.ndarray, " R"], rule: Outliers
) -> Bool[np.ndarray, " R"]:
    residual = np.abs(predicted - np.log(runs.loss))
    if rule == "auto":
        return residual > _ROBUST_DEVIATIONS * _NORMAL_MAD * np.median(residual)
    by, count = (runs.loss, rule[1]) if isinstance(rule, tuple) else (residual, rule)
    outliers = np.zeros(len(runs), bool)
    outliers[np.argsort(-by, kind="stable")[: int(count)]] = True
    return outliers


_TERMS: Sequence[tuple[str, int, int]] = (("A/N^α", 0, 3), ("B/D^β", 1, 4))


def _gone(
    law: LogSurface, theta: Float[np.ndarray, "S 5"], log_loss: Float[np.ndarray, " R"]
) -> Bool[np.ndarray, "S 2"]:
    """Return for both terms whether they explain nothing, or not as a power law."""
    terms = law.terms(theta).max(-1)
    columns = []
    for _, i, exponent in _TERMS:
        alpha = theta[:, exponent]
        tiny = terms[i] < log_loss.min() - _VANISHING + 1.0
        columns.append(tiny | (alpha < _EXPONENTS[0]) | (alpha > _EXPONENTS[1]))
    return np.stack(columns, -1)


def _runaway(
    law: LogSurface, theta: Float[np.ndarray, "S 5"], log_loss: Float[np.ndarray, " R"]
) -> Bool[np.ndarray, " S"]:
    return _gone(law, theta, log_loss).any(-1)


def _check_point(
    law: LogSurface, best: Float[np.ndarray, "1 5"], log_loss: Float[np.ndarray, " R"]
) -> None:
    for (name, _, exponent), gone in zip(_TERMS, _gone(law, best, log_loss)[0], strict=True):
        if gone:
            size = "parameters" if exponent == 3 else "tokens"
            raise NotIdentifiableError(
                f"the best fit has no term {name} (its exponent is {best[0, exponent]:.3g}): in "
                f"these runs the loss does not fall with {size} as a power law; add runs over a "
                f"wider range of {size}"
            )


def _check_draws(
    law: LogSurface,
    theta: Float[np.ndarray, "draws 5"],
    log_loss: Float[np.ndarray, " R"],
    converged: Bool[np.ndarray, " draws"],
    level: float,
) -> None:
    """Refuse intervals of which an end would lie at a limit."""
    most = (1 - level) / 2
    gone = _gone(law, theta, log_loss).mean(0)
    for (name, _, exponent), share in zip(_TERMS, gone, strict=True):
        if share > most:
            size = "sizes of model" if exponent == 3 else "amounts of tokens"
            raise NotIdentifiableError(
                f"the term {name} has no interval: in {share:.0%} of the resamples it vanishes or "
                f"its exponent leaves {_EXPONENTS[0]} to {_EXPONENTS[1]}; add more {size}, over a "
                "wider range"
            )
    if np.mean(~converged) > most:
        raise NotIdentifiableError(
            f"{np.mean(~converged):.0%} of the resamples have no fit of their own: too few runs "
            "carry the constants; add runs"
        )
