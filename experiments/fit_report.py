"""The report of experiments.fit: report.md, report.html with figures, and all that they plot."""

import pyarrow as pa
import pyarrow.csv
from etils import epath

from experiments import entry
from experiments.fit_figures import Plotted, figures_of
from experiments.fit_summary import (
    LAWS,
    Analysis,
    budget_rows,
    estimate_rows,
    held_out_in_words,
    number,
    optimum_rows,
    single_rows,
    starts_in_words,
    value_columns,
    with_interval,
)
from llm.evaluation.report import Report, Section, Table, write_report

PLOTTED_COLUMNS = ("figure", "series", "x", "y", "low", "high")


def write_fit_report(directory: epath.Path, analysis: Analysis) -> None:
    """Write report.md, report.html, report_figures/ and plotted.csv."""
    plotted = Plotted()
    fit, level = analysis.fit, analysis.fit.level
    optima = _table(*optimum_rows(analysis.optima), f"In brackets {level:.0%} intervals.")
    goodness = [starts_in_words(fit.starts)] if hasattr(fit, "starts") else []
    if analysis.held_out is not None:
        goodness.append(held_out_in_words(analysis.held_out))
    goodness = [f"{text[0].upper()}{text[1:]}." for text in goodness]
    sections = [
        Section("The law", analysis.headline(), law_tables(analysis)),
        Section("The best model for a budget", "", (optima,)) if analysis.optima else None,
        Section("How well it fits", "\n\n".join(goodness), (), figures_of(analysis, plotted)),
        Section("Notes", "\n\n".join(analysis.notes)) if analysis.notes else None,
    ]
    title = f"Scaling law of {epath.Path(analysis.source).name}"
    directory.mkdir(parents=True, exist_ok=True)
    kept = tuple(section for section in sections if section)
    write_report(Report(title, _facts(analysis), kept, entry.command_line()), directory)
    columns = zip(*plotted.rows, strict=True)
    arrays = [pa.array(column, from_pandas=True) for column in columns]  # NaN: an empty cell
    table = pa.table(dict(zip(PLOTTED_COLUMNS, arrays, strict=True)))
    with (directory / "plotted.csv").open("wb") as stream:
        pa.csv.write_csv(table, stream)


def law_tables(analysis: Analysis) -> tuple[Table, ...]:
    """Return the constants of the law, and what its method has beside them."""
    tables, fit = [], analysis.fit
    if estimates := fit.estimates():
        rows = tuple(estimate_rows(estimates))
        caption = "Intervals by bootstrap: percentiles of fits to resampled runs."
        if analysis.method == "isoflop":
            caption = "Intervals by bootstrap: percentiles of fits to resampled residuals."
        tables.append(Table(("Constant", *value_columns(fit.level)), rows, caption))
    if analysis.method == "isoflop":
        tables.append(_table(*budget_rows(fit), "The minimum of each budget's parabola."))
    if analysis.method == "kaplan":
        tables.append(_table(*single_rows(fit), "Single laws, (scale/x)^exponent."))
    return tuple(tables)


def _facts(analysis: Analysis) -> dict[str, str]:
    facts = {"Law": LAWS[analysis.method], "Rows": f"{len(analysis.runs):,}"}
    exponents = analysis.fit.estimates()
    if "params_exponent" in exponents:
        facts["N_opt ∝ C^a, a"] = with_interval(exponents["params_exponent"])
    if analysis.optima:
        best = analysis.optima[0]
        name = f"Tokens per parameter at {number(best.flops)} FLOPs"
        facts[name] = with_interval(best.tokens_per_param)
    if analysis.held_out is not None:
        scores = analysis.held_out.scores()
        facts["Error on held-out runs"] = f"{scores['mean_relative_error']:.2%}"
    return facts


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], caption: str) -> Table:
    return Table(columns, tuple(rows), caption)
