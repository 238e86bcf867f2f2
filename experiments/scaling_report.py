"""The report of a ladder: what was run, the laws fitted to it, and what the figures show."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from etils import epath

from configs.schema import ScalingConfig
from experiments import entry
from experiments.fit_figures import Plotted, figures_of
from experiments.fit_methods import FitOptions, analyse
from experiments.fit_report import PLOTTED_COLUMNS, law_tables
from experiments.fit_summary import Analysis, held_out_in_words, optimum_in_words
from experiments.scaling_figures import (
    best_rates,
    curves_figure,
    in_context_figure,
    octaves,
    repetition_figure,
    transfer_figure,
)
from llm.evaluation.facts import hardware_facts, version_facts
from llm.evaluation.report import Figure, Report, Section, Table, write_report
from llm.evaluation.tables import (
    facts_table,
    format_duration,
    goodput_table,
    wall_time_table,
)
from llm.scaling.config import LadderConfig
from llm.scaling.runs import NotIdentifiableError, Runs
from llm.training.files import write_atomically
from llm.training.goodput import find_goodput, sum_goodput

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
            pooled = [row for row in main if _like(config.ladders[row["ladder"]], ladder)]
            found, summary[name] = _repetition_sections(name, ours, pooled, config, plotted)
            sections += found
    rates = {
        name: [row for row in main if row["ladder"] == name and row["final"]]
        for name, ladder in config.ladders.items()
        if len(ladder.learning_rates) > 2 and len(ladder.depths) > 1
    }
    if rates:
        sections.append(_transfer_section(rates))
        summary["best_learning_rates"] = {n: best_rates(found) for n, found in rates.items()}
    hardware, versions, runs = hardware_facts(), version_facts(), find_goodput(workdir)
    sections += [
        Section("Wall time", tables=(wall_time_table(wall_seconds), goodput_table(runs))),
        Section("Made with", tables=(facts_table(hardware), facts_table(versions))),
    ]
    summary["goodput"] = sum_goodput(runs.values()).goodput
    summary |= {
        "wall_seconds": wall_seconds,
        "hardware": hardware,
        "versions": versions,
    }
    write_atomically(workdir / "summary.json", json.dumps(entry.plain(summary), indent=1))
    _write_plotted(workdir / "plotted.csv", plotted)
    facts = {
        "runs": f"{len({row['run'] for row in rows})}",
        "parameters": f"{min(r['params'] for r in rows):,} to {max(r['params'] for r in rows):,}",
        "wall time": format_duration(wall_seconds["total"]),
        "config": "config.json, overrides included",
    }
    write_report(Report("Scaling curves", facts, tuple(sections), entry.command_line()), workdir)


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
    others = {name: column(name) for name in ("flops", "unique_tokens")}
    others |= {} if numbers is None else {"run": np.asarray(numbers)}
    return Runs.of(column("params"), column("tokens"), column("loss"), **others)


def analyses(name: str, rows: Rows, config: ScalingConfig) -> tuple[list[Analysis], dict[str, str]]:
    """Return every law that can be fitted to a ladder, and why the others cannot."""
    points = as_runs(selected(rows))
    names = list(dict.fromkeys(row["run"] for row in rows))
    walked = [row for row in rows if row["step"] > 0 and np.isfinite(row["loss"])]
    curves = as_runs(walked, [names.index(row["run"]) for row in walked])
    tables = {"isoflop": points, "parametric": points, "envelope": curves, "kaplan": points}
    return _attempt(f"ladder {name}", tables, config)


def _attempt(
    source: str, tables: Mapping[str, Runs], config: ScalingConfig
) -> tuple[list[Analysis], dict[str, str]]:
    """Return the fits of the methods, each to its runs, and why others were refused."""
    options = FitOptions(num_draws=config.bootstrap_draws, holdout_fraction=config.holdout_fraction)
    done, refused = [], {}
    for method, runs in tables.items():
        try:
            done.append(analyse(method, source, runs, options))
        except NotIdentifiableError as error:
            refused[method] = str(error)
    return done, refused


def _law_sections(
    name: str, rows: Rows, config: ScalingConfig, plotted: Plotted
) -> tuple[list[Section], dict[str, Any]]:
    curves = Section(
        f"Loss over compute: {name}",
        "Every run of the ladder from its first evaluation to its last. Where the curves of larger "
        "models come below those of smaller ones the best size grows with compute.",
        figures=_named(name, (curves_figure(rows),)),
    )
    done, refused = analyses(name, rows, config)
    sections = [curves]
    if all(row["in_context_score"] is not None for row in rows):
        sections.append(_in_context_section(name, rows))
    found, summary = _told(name, done, refused, plotted)
    return sections + found, summary


def _told(
    name: str, done: Sequence[Analysis], refused: Mapping[str, str], plotted: Plotted
) -> tuple[list[Section], dict[str, Any]]:
    """Return a section for each fit and one for those refused, and numbers for summary.json."""
    sections = [_law_section(name, analysis, plotted) for analysis in done]
    summary: dict[str, Any] = {analysis.method: _law_summary(analysis) for analysis in done}
    if refused:
        text = "\n\n".join(f"{method}: {reason}." for method, reason in refused.items())
        sections.append(Section(f"Not fitted: {name}", text))
        summary["refused"] = dict(refused)
    return sections, summary


def _named(ladder: str, figures: Sequence[Figure]) -> tuple[Figure, ...]:
    """Return the figures under names that no other ladder's have."""
    return tuple(dataclasses.replace(x, name=_slug(f"{ladder}-{x.name}")) for x in figures)


def _slug(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", name)


def _law_section(name: str, analysis: Analysis, plotted: Plotted) -> Section:
    text = [analysis.headline(), *map(optimum_in_words, analysis.optima)]
    if analysis.held_out is not None:
        text.append(held_out_in_words(analysis.held_out))
    text += analysis.notes
    text = [f"{part[0].upper()}{part[1:].rstrip('.')}." for part in text]
    drawn, where = Plotted(), f"{name}-{analysis.method}"
    figures = _named(where, figures_of(analysis, drawn))
    plotted.rows += [(_slug(f"{where}-{figure}"), *point) for figure, *point in drawn.rows]
    return Section(
        f"{analysis.method.replace('_', '-').capitalize()} fit: {name}",
        "\n\n".join(text),
        law_tables(analysis),
        figures,
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
        rates_of = ", ".join(f"{found[width]:.3g}" for width in widths)
        what = f"{rows[0]['optimizer']}, {rows[0]['parametrisation']}"
        table.append((name, what, ", ".join(map(str, widths)), rates_of, octaves(rows)))
    text = (
        "The same length of training at every width and learning rate. Under muP the best rate "
        "should stay where it is as the model grows wider; the last column tells by how many "
        "factors of two it moved from the narrowest to the widest."
    )
    columns = ("Ladder", "Parametrisation", "Widths", "Best rates", "Shift (octaves)")
    by_optimizer: dict[str, dict[str, Rows]] = {}
    for name, rows in rates.items():
        by_optimizer.setdefault(rows[0]["optimizer"], {})[name] = rows
    figures = tuple(transfer_figure(*item) for item in by_optimizer.items())
    return Section("Learning-rate transfer", text, (Table(columns, tuple(table)),), figures)


def _in_context_section(name: str, rows: Rows) -> Section:
    text = (
        "How much context helps: the loss of tokens with at least 7/8 of a row before them in "
        "their document, less that of tokens with 1/16 to 1/8 (Olsson et al. 2022, who take the "
        "500th and the 50th of 512), on held-out text."
    )
    return Section(
        f"In-context score: {name}", text, figures=_named(name, (in_context_figure(rows),))
    )


def _like(one: LadderConfig, other: LadderConfig) -> bool:
    """Whether runs of two ladders lie on one loss surface: models of one kind, trained alike."""
    names = ("width_per_layer", "head_dim", "num_layers", "mup_base_depth", "optimizer", "schedule")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _repetition_sections(
    name: str, rows: Rows, pooled: Rows, config: ScalingConfig, plotted: Plotted
) -> tuple[list[Section], dict[str, Any]]:
    """Return what repeating the text did, and the law of it fitted to all runs trained alike."""
    ends = sorted(
        (row for row in rows if row["final"]), key=lambda r: (r["depth"], -r["unique_tokens"])
    )
    columns = ("Parameters", "Tokens", "Unique tokens", "Epochs", "Held-out loss", "Training loss")
    names = ("params", "tokens", "unique_tokens", "epochs", "loss", "train_loss")
    table = Table(columns, tuple(tuple(row[column] for column in names) for row in ends))
    text = (
        "The same lengths of training with ever less text, which is then read several times. "
        "Training loss goes on falling; held-out loss tells what a repetition is worth."
    )
    section = Section(
        f"Repeated text: {name}", text, (table,), _named(name, (repetition_figure(rows),))
    )
    source = "ladders " + " and ".join(dict.fromkeys(row["ladder"] for row in pooled))
    fits = _attempt(source, {"data_constrained": as_runs(selected(pooled))}, config)
    found, summary = _told(name, *fits, plotted)
    losses = {f"depth_{r['depth']}/{r['unique_tokens']}_unique_tokens": r["loss"] for r in ends}
    return [section, *found], summary | {"losses": losses}


def _write_plotted(path: epath.Path, plotted: Plotted) -> None:
    columns = list(zip(*plotted.rows, strict=True)) or [()] * len(PLOTTED_COLUMNS)
    arrays = [pa.array(column, from_pandas=True) for column in columns]
    with path.open("wb") as stream:
        pa.csv.write_csv(pa.table(dict(zip(PLOTTED_COLUMNS, arrays, strict=True))), stream)
