"""The methods of fitting by name: each its fit, the best models for budgets, what it foretells."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.fit_summary import Analysis
from llm.scaling.data_constrained import fit_data_constrained
from llm.scaling.envelope import fit_envelope, hold_out_envelope
from llm.scaling.held_out import HeldOut, hold_out_loss
from llm.scaling.isoflop import fit_isoflop, hold_out_budgets
from llm.scaling.kaplan import fit_kaplan
from llm.scaling.parametric import Outliers, default_starts, fit_parametric, hoffmann_starts
from llm.scaling.robust import HUBER_DELTA
from llm.scaling.runs import NotIdentifiableError, Runs

METHODS = ("parametric", "isoflop", "envelope", "kaplan", "data_constrained")
Fitted = tuple[Any, Callable[[], HeldOut]]  # a fit, and how to hold out the largest runs


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """What the methods take; each takes its part."""

    num_draws: int = 500  # of the bootstrap; 0: no intervals
    level: float = 0.95
    seed: int = 0
    holdout_fraction: float = 0.2  # of the runs or budgets, the largest; 0: none
    delta: float = HUBER_DELTA
    outliers: Outliers = "none"  # parametric
    all_starts: bool = False  # parametric
    variable: str = "params"  # isoflop: what the parabolas are of
    budgets: tuple[float, ...] | None = None  # isoflop; None: found in the table
    tolerance: float = 0.1  # isoflop: how far off its budget a run may be
    unique_tokens: float = float("inf")  # data_constrained: of the optima

    @property
    def bootstrap(self) -> dict[str, Any]:
        return {"num_draws": self.num_draws, "level": self.level, "seed": self.seed}


def analyse(
    method: str,
    source: str,
    runs: Runs,
    options: FitOptions,
    *,
    budgets: Sequence[float] = (),
    notes: Sequence[str] = (),
) -> Analysis:
    """Return the fit of a method to the runs of a source, with all that is reported of it.

    `budgets` in FLOPs are what the best models are told for: by default the largest run's and ten
    times that.

    Raises:
      NotIdentifiableError: the runs do not determine the law.
    """
    fit, hold_out = _METHODS[method](runs, options)
    notes, optima, held_out = [*notes, *fit.notes], [], None
    for budget in budgets or (float(runs.flops.max()), 10 * float(runs.flops.max())):
        try:
            optima.append(fit.optimum(budget))
        except NotIdentifiableError as error:
            notes.append(f"no optimum for a budget: {error}")
            break
    if options.holdout_fraction:
        try:
            held_out = hold_out()
        except NotIdentifiableError as error:
            notes.append(f"nothing held out: {error}")
    return Analysis(method, source, runs, fit, tuple(optima), held_out, tuple(notes))


def _parametric(runs: Runs, options: FitOptions) -> Fitted:
    common = {**options.bootstrap, "delta": options.delta, "outliers": options.outliers}
    starts = hoffmann_starts() if options.all_starts else default_starts(len(runs))
    few = starts[:: max(1, len(starts) // 50)]
    return (
        fit_parametric(runs, starts=starts, **common),
        _by_loss(runs, options, lambda smaller: fit_parametric(smaller, starts=few, **common)),
    )


def _isoflop(runs: Runs, options: FitOptions) -> Fitted:
    common = {
        **options.bootstrap,
        "variable": options.variable,
        "budgets": None if options.budgets is None else list(options.budgets),
        "tolerance": options.tolerance,
    }
    fit = fit_isoflop(runs, **common)
    return fit, lambda: hold_out_budgets(runs, fraction=options.holdout_fraction, **common)


def _envelope(runs: Runs, options: FitOptions) -> Fitted:
    fit = fit_envelope(runs, **options.bootstrap)
    return fit, lambda: hold_out_envelope(
        runs, fraction=options.holdout_fraction, **options.bootstrap
    )


def _kaplan(runs: Runs, options: FitOptions) -> Fitted:
    common = {**options.bootstrap, "delta": options.delta}
    return (
        fit_kaplan(runs, **common),
        _by_loss(runs, options, lambda smaller: fit_kaplan(smaller, **common)),
    )


def _data_constrained(runs: Runs, options: FitOptions) -> Fitted:
    common = {
        **options.bootstrap,
        "delta": options.delta,
        "unique_tokens": options.unique_tokens,
    }
    return (
        fit_data_constrained(runs, **common),
        _by_loss(runs, options, lambda smaller: fit_data_constrained(smaller, **common)),
    )


_METHODS = dict(
    zip(METHODS, (_parametric, _isoflop, _envelope, _kaplan, _data_constrained), strict=True)
)


def _by_loss(runs: Runs, options: FitOptions, fit: Callable[[Runs], Any]) -> Callable[[], HeldOut]:
    def predict(smaller: Runs, larger: Runs):
        return fit(smaller).predict(larger, np.random.default_rng(options.seed))

    return lambda: hold_out_loss(
        runs, predict, fraction=options.holdout_fraction, level=options.level
    )
