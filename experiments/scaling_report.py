"""The report of a ladder: what was run, the laws fitted to it, and what the figures show."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from absl import flags
from etils import epath

from configs.schema import ScalingConfig
from experiments import entry
from experiments.fit_figures import Plotted, figures_of
from experiments.fit_report import PLOTTED_COLUMNS
from experiments.fit_summary import Analysis, estimate_rows, held_out_in_words, optimum_in_words
from experiments.scaling_figures import (
    best_rates,
    curves_figure,
    repetition_figure,
    transfer_figure,
)
from llm.evaluation.facts import hardware_facts, version_facts
from llm.evaluation.report import Report, Section, Table, write_report
from llm.evaluation.tables import facts_table, format_duration, wall_time_table
from llm.scaling.envelope import fit_envelope, hold_out_envelope
from llm.scaling.held_out import HeldOut, hold_out_loss
from llm.scaling.isoflop import fit_isoflop, hold_out_budgets
from llm.scaling.kaplan import fit_kaplan
from llm.scaling.parametric import fit_parametric
from llm.scaling.runs import NotIdentifiableError, Runs
from llm.training.files import write_atomically

Rows = Sequence[Mapping[str, Any]]


def write_scaling_report(
    workdir: epath.Path, config: ScalingConfig, rows: Rows, wall_seconds: dict[str, float]
) -> None:
    """Write report.md, report.html, summary.json and plotted.csv from the rows of evaluations."""
    names = {row["source"] for row in rows}
    main_source = "all" if "all" in names else next(iter(names))
    rows = [row for row in rows if row["source"] == main_source or row["final"]]
    main = [row for row in rows if row["source"] == main_source]
    plotted, summary = Plotted(), {}
    sections = [_runs_section(rows)]
    for name, ladder in config.ladders.items():
        ours = [row for row in main if row["ladder"] == name]
        if ladder.flops or len(ladder.tokens) + len(ladder.tokens_per_param) > 1:
            found, summary[name] = _law_sections(name, ours, config, plotted)
            sections += found
        if len(ladder.unique_tokens) > 1:
            sections.append(_repetition_section(name, ours))
            ends = [row for row in ours if row["final"]]
            summary[name] = {f"{r['unique_tokens']}_unique_tokens": r["loss"] for r in ends}
    rates = {
        name: [row for row in main if row["ladder"] == name and row["final"]]
        for name, ladder in config.ladders.items()
        if len(ladder.learning_rates) > 2 and len(ladder.depths) > 1
    }
    if rates:
        sections.append(_transfer_section(rates))
        summary["best_learning_rates"] = {n: best_rates(found) for n, found in rates.items()}
    hardware, versions = hardware_facts(), version_facts()
    sections += [
        Section("Wall time", tables=(wall_time_table(wall_seconds),)),
        Section("Made with", tables=(facts_table(hardware), facts_table(versions))),
    ]
    summary |= {"wall_seconds": wall_seconds, "hardware": hardware, "versions": versions}
    write_atomically(workdir / "summary.json", json.dumps(entry.plain(summary), indent=1))
    _write_plotted(workdir / "plotted.csv", plotted)
    runs = {row["run"] for row in rows}
    facts = {
        "runs": f"{len(runs)}",
        "parameters": f"{min(r['params'] for r in rows):,} to {max(r['params'] for r in rows):,}",
        "wall time": format_duration(wall_seconds["total"]),
        "command": f"python -m experiments.scaling --config={flags.FLAGS.config}",
        "config": "config.json, overrides included",
    }
    write_report(Report("Scaling curves", facts, tuple(sections)), workdir)


# ------------------------------------------------------------------------------- laws


def selected(rows: Rows) -> list[dict[str, Any]]:
    """Return a row for each size and length: the learning rate of least final loss, with the loss
    averaged over seeds. Runs that diverged are not the least."""
    groups: dict[tuple, dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["final"] and np.isfinite(row["loss"]):
            key = (row["depth"], row["budget"], row["unique_tokens"])
            groups.setdefault(key, {}).setdefault(row["learning_rate"], []).append(row)
    found = []
    for by_rate in groups.values():
        means = {rate: np.mean([row["loss"] for row in each]) for rate, each in by_rate.items()}
        best = min(means, key=means.get)
        found.append(dict(by_rate[best][0]) | {"loss": float(means[best])})
    return found


def as_runs(rows: Rows, numbers: Sequence[int] | None = None) -> Runs:
    """Return rows as what laws are fitted to; `numbers` tell which rows are of one run."""
    column = lambda name: np.array([row[name] for row in rows], float)  # noqa: E731
    others = {} if numbers is None else {"run": np.asarray(numbers)}
    return Runs.of(
        column("params"), column("tokens"), column("loss"), flops=column("flops"), **others
    )


def analyses(name: str, rows: Rows, config: ScalingConfig) -> tuple[list[Analysis], dict[str, str]]:
    """Return every law that can be fitted to a ladder, and why the others cannot."""
    points = as_runs(selected(rows))
    names = list(dict.fromkeys(row["run"] for row in rows))
    walked = [row for row in rows if row["step"] > 0 and np.isfinite(row["loss"])]
    curves = as_runs(walked, [names.index(row["run"]) for row in walked])
    share = config.holdout_fraction
    options = {"num_draws": config.bootstrap_draws}

    def by_loss(fit: Callable[..., Any]) -> Callable[[], HeldOut]:
        def predict(smaller: Runs, larger: Runs):
            return fit(smaller, **options).predict(larger, np.random.default_rng(0))

        return lambda: hold_out_loss(points, predict, fraction=share, level=0.95)

    methods = {
        "isoflop": (
            points,
            lambda: fit_isoflop(points, **options),
            lambda: hold_out_budgets(points, fraction=share, **options),
        ),
        "parametric": (
            points,
            lambda: fit_parametric(points, **options),
            by_loss(fit_parametric),
        ),
        "envelope": (
            curves,
            lambda: fit_envelope(curves, **options),
            lambda: hold_out_envelope(curves, fraction=share, **options),
        ),
        "kaplan": (points, lambda: fit_kaplan(points, **options), by_loss(fit_kaplan)),
    }
    done, refused = [], {}
    for method, (runs, fit_law, hold_out) in methods.items():
        try:
            done.append(_analysis(method, name, runs, fit_law(), hold_out if share else None))
        except NotIdentifiableError as error:
            refused[method] = str(error)
    return done, refused


def _analysis(
    method: str, name: str, runs: Runs, fit: Any, hold_out: Callable[[], HeldOut] | None
) -> Analysis:
    notes, optima, held_out = list(fit.notes), [], None
    for budget in (float(runs.flops.max()), 10 * float(runs.flops.max())):
        try:
            optima.append(fit.optimum(budget))
        except NotIdentifiableError as error:
            notes.append(f"no optimum for {budget:.3g} FLOPs: {error}")
    if hold_out is not None:
        try:
            held_out = hold_out()
        except NotIdentifiableError as error:
            notes.append(f"nothing held out: {error}")
    return Analysis(method, f"ladder {name}", runs, fit, tuple(optima), held_out, tuple(notes))


def _law_sections(
    name: str, rows: Rows, config: ScalingConfig, plotted: Plotted
) -> tuple[list[Section], dict[str, Any]]:
    curves = Section(
        f"Loss over compute: {name}",
        "Every run of the ladder from its first evaluation to its last. Where the curves of larger "
        "models come below those of smaller ones the best size grows with compute.",
        figures=(curves_figure(rows),),
    )
    done, refused = analyses(name, rows, config)
    sections, summary = [curves], {}
    for analysis in done:
        sections.append(_law_section(analysis, plotted))
        summary[analysis.method] = _law_summary(analysis)
    if refused:
        text = "\n\n".join(f"{method}: {reason}." for method, reason in refused.items())
        sections.append(Section(f"Not fitted: {name}", text))
        summary["refused"] = refused
    return sections, summary


def _law_section(analysis: Analysis, plotted: Plotted) -> Section:
    text = [analysis.headline(), *map(optimum_in_words, analysis.optima)]
    if analysis.held_out is not None:
        text.append(held_out_in_words(analysis.held_out))
    text += analysis.notes
    text = [f"{part[0].upper()}{part[1:].rstrip('.')}." for part in text]
    tables = ()
    if estimates := analysis.fit.estimates():
        columns = ("Constant", "Estimate", f"{analysis.fit.level:.0%} interval")
        tables = (Table(columns, tuple(estimate_rows(estimates))),)
    return Section(
        f"{analysis.method.capitalize()} fit",
        "\n\n".join(text),
        tables,
        figures_of(analysis, plotted),
    )


def _law_summary(analysis: Analysis) -> dict[str, Any]:
    held_out = analysis.held_out
    return {
        "estimates": analysis.fit.estimates(),
        "optima": analysis.optima,
        "held_out": None if held_out is None else held_out.scores(),
        "notes": analysis.notes,
    }


# ----------------------------------------------------------------------------- others


def _runs_section(rows: Rows) -> Section:
    sources = sorted({row["source"] for row in rows})
    ends: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["final"]:
            ends.setdefault(row["run"], dict(row))[f"loss/{row['source']}"] = row["loss"]
    best = {row["run"] for row in selected([r for r in rows if r["source"] == sources[0]])}
    table = tuple(
        (
            run,
            row["width"],
            row["params"],
            row["tokens"],
            f"{row['flops']:.2e}",
            f"{row['learning_rate']:.3g}",
            row["regime"],
            *(row.get(f"loss/{source}") for source in sources),
        )
        for run, row in ends.items()
        if run in best or len(ends) <= 60
    )
    columns = (
        "Run", "Width", "Parameters", "Tokens", "FLOPs", "Learning rate", "Text", *sources,
    )  # fmt: skip
    caption = "Held-out loss at the end of each run, in nats a token, by source."
    text = f"{len(ends)} runs in all; evaluations.csv and runs.csv have every one of them."
    return Section("Runs", text, (Table(columns, table, caption),))


def _transfer_section(rates: Mapping[str, Rows]) -> Section:
    table = []
    for name, rows in rates.items():
        found = best_rates(rows)
        widths = sorted(found)
        octaves = np.log2(found[widths[-1]] / found[widths[0]])
        rates_of = ", ".join(f"{found[width]:.3g}" for width in widths)
        what = f"{rows[0]['optimizer']}, {rows[0]['parametrisation']}"
        table.append((name, what, ", ".join(map(str, widths)), rates_of, float(octaves)))
    text = (
        "The same length of training at every width and learning rate. Under muP the best rate "
        "should stay where it is as the model grows wider; the last column tells by how many "
        "factors of two it moved from the narrowest to the widest."
    )
    columns = ("Ladder", "Parametrisation", "Widths", "Best rates", "Shift (octaves)")
    return Section(
        "Learning-rate transfer", text, (Table(columns, tuple(table)),), (transfer_figure(rates),)
    )


def _repetition_section(name: str, rows: Rows) -> Section:
    text = (
        "One size and length of training with ever less text, which is then read several times. "
        "Training loss goes on falling; held-out loss tells what a repetition is worth."
    )
    return Section(f"Repeated text: {name}", text, figures=(repetition_figure(rows),))


def _write_plotted(path: epath.Path, plotted: Plotted) -> None:
    columns = list(zip(*plotted.rows, strict=True)) or [()] * len(PLOTTED_COLUMNS)
    arrays = [pa.array(column, from_pandas=True) for column in columns]
    with path.open("wb") as stream:
        pa.csv.write_csv(pa.table(dict(zip(PLOTTED_COLUMNS, arrays, strict=True))), stream)
