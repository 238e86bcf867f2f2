"""What experiments.fit has found, and how it prints that; its report has the same tables."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from llm.scaling.bootstrap import Estimate, Optimum
from llm.scaling.held_out import HeldOut
from llm.scaling.isoflop import IsoFlopFit
from llm.scaling.kaplan import KaplanFit
from llm.scaling.parametric import StartReport
from llm.scaling.runs import Runs

Rows = list[tuple[str, ...]]

# The symbols of the papers, in the order of tables.
SYMBOLS = {
    "E": "E (nats per token)",
    "A": "A",
    "B": "B",
    "alpha": "α",
    "beta": "β",
    "N_c": "N_c (parameters)",
    "D_c": "D_c (tokens)",
    "alpha_N": "α_N",
    "alpha_D": "α_D",
    "R_D_star": "R*_D (repetitions)",
    "R_N_star": "R*_N (repetitions)",
    "params_exponent": "a of N_opt ∝ C^a",
    "tokens_exponent": "b of D_opt ∝ C^b",
}
LAWS = {
    "parametric": "L = E + A/N^α + B/D^β",
    "isoflop": "a parabola of loss at each budget",
    "envelope": "the envelope of training curves",
    "kaplan": "L = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D",
    "data_constrained": "L = E + A/N'^α + B/D'^β, N' and D' as repeated",
}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A fit with all that is reported of it."""

    method: str
    source: str
    runs: Runs
    fit: Any  # of its method: estimates(), optimum(flops), level, notes
    optima: tuple[Optimum, ...]
    held_out: HeldOut | None
    notes: tuple[str, ...]

    def headline(self) -> str:
        """Return what was fitted to what, in a sentence."""
        params, tokens = self.runs.num_params, self.runs.num_tokens
        return (
            f"{self.method} fit, {LAWS[self.method]}, to {len(self.runs)} rows of {self.source}: "
            f"{number(params.min())} to {number(params.max())} parameters, "
            f"{number(tokens.min())} to {number(tokens.max())} tokens."
        )


def show(analysis: Analysis) -> None:
    """Print notes, constants, optima and the errors on held-out runs."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    fit = analysis.fit
    console.print(analysis.headline())
    for note in analysis.notes:
        console.print(f"note: {note}")
    if hasattr(fit, "starts"):
        console.print(starts_in_words(fit.starts))
    console.print()
    estimates = fit.estimates()
    if estimates:
        console.print(_table(("Constant", *value_columns(fit.level)), estimate_rows(estimates)))
    if analysis.method == "isoflop":
        console.print(_table(*budget_rows(fit)))
    if analysis.method == "kaplan":
        console.print(_table(*single_rows(fit)))
    for optimum in analysis.optima:
        console.print(optimum_in_words(optimum))
    if analysis.held_out is not None:
        console.print(held_out_in_words(analysis.held_out))


def _table(columns: tuple[str, ...], rows: Rows) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def number(value: float) -> str:
    """Return a number to four digits; large and small ones as powers of ten."""
    return f"{value:.4g}".replace("e+", "e") if value == value else "–"


def with_interval(estimate: Estimate) -> str:
    """Return "value (low to high)"."""
    if estimate.low != estimate.low:
        return number(estimate.value)
    return f"{number(estimate.value)} ({number(estimate.low)} to {number(estimate.high)})"


def value_columns(level: float) -> tuple[str, str]:
    return ("Value", f"{level:.0%} interval")


def estimate_rows(estimates: dict[str, Estimate]) -> Rows:
    """Return each constant with its value and interval, as text."""
    return [
        (
            SYMBOLS[name],
            number(x.value),
            f"{number(x.low)} to {number(x.high)}" if x.low == x.low else "none",
        )
        for name, x in estimates.items()
    ]


def optimum_in_words(optimum: Optimum) -> str:
    """Return the best model for a budget in one sentence."""
    loss = f", loss {with_interval(optimum.loss)}" if optimum.loss else ""
    return (
        f"best for {number(optimum.flops)} FLOPs: {with_interval(optimum.num_params)} parameters, "
        f"{with_interval(optimum.num_tokens)} tokens, {with_interval(optimum.tokens_per_param)} "
        f"tokens per parameter{loss}"
    )


def optimum_rows(optima: tuple[Optimum, ...]) -> tuple[tuple[str, ...], Rows]:
    """Return the columns and rows of the table of optima."""
    columns = ("Best for (FLOPs)", "Parameters", "Tokens", "Tokens per parameter", "Loss")
    rows = [
        (
            number(x.flops),
            with_interval(x.num_params),
            with_interval(x.num_tokens),
            with_interval(x.tokens_per_param),
            with_interval(x.loss) if x.loss else "–",
        )
        for x in optima
    ]
    return columns, rows


def budget_rows(fit: IsoFlopFit) -> tuple[tuple[str, ...], Rows]:
    """Return the columns and rows of the table of isoFLOP budgets, refused ones last."""
    what = "parameters" if fit.variable == "params" else "tokens"
    columns = ("Budget (FLOPs)", "Runs", f"Best {what}", "Least loss")
    rows = [
        (number(p.flops), str(len(p.sizes)), with_interval(p.size), with_interval(p.least_loss))
        for p in fit.parabolas
    ]
    rows += [(number(r.flops), str(len(r.sizes)), f"none: {r.reason}", "–") for r in fit.refused]
    return columns, rows


def single_rows(fit: KaplanFit) -> tuple[tuple[str, ...], Rows]:
    """Return the columns and rows of the table of Kaplan's single laws."""
    columns = ("Law", "Rows", "Exponent", "Scale")
    rows = [
        (law.name, str(law.num_points), f"none: {law.refused}", "–")
        if law.refused
        else (law.name, str(law.num_points), with_interval(law.exponent), with_interval(law.scale))
        for law in fit.single
    ]
    return columns, rows


def starts_in_words(starts: StartReport) -> str:
    """Return how many starts arrived."""
    if starts.arrived == starts.count:
        return f"all {starts.count} starts arrive at one optimum"
    return (
        f"{starts.arrived} of {starts.count} starts arrive at the best optimum; the others end "
        f"higher, at up to {number(starts.worst)} of the objective"
    )


def held_out_in_words(held_out: HeldOut) -> str:
    """Return the errors on the held-out runs in one sentence."""
    scores = held_out.scores()
    count, inside = scores["num_runs"], scores["share_in_interval"]
    loss = held_out.quantity.startswith("loss")
    error = scores["mean_absolute_error"]
    what = ("run" if loss else "point") + "s" * (count != 1)
    words = (
        f"held out: a fit up to {number(held_out.fitted_up_to_flops)} FLOPs foretells the "
        f"{held_out.quantity.split(' (')[0]} of {count} larger {what} to "
        f"{f'{error:.4f} nats' if loss else number(error)} ({scores['mean_relative_error']:.2%})"
    )
    if count > 1:
        words += (
            f" on average, signed {number(scores['mean_signed_error'])}, "
            f"R² {number(scores['r_squared'])}"
        )
    if inside == inside:
        words += f", {inside:.0%} within the {held_out.level:.0%} interval"
    return words
