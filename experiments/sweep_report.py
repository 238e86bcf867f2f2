"""A sweep's report.md, report.html, summary.json and members.csv, from how its members stand."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from configs.schema import SweepConfig
from experiments import entry
from experiments.sweep_cost import Cost, cost_of, total
from experiments.sweep_figures import (
    curves_figure,
    field_figure,
    format_value,
    measured,
    parallel_figure,
)
from experiments.sweep_members import varying_fields
from experiments.sweep_results import Result, read_rungs
from llm.evaluation.facts import version_facts
from llm.evaluation.report import Report, Sample, Section, Table, write_report
from llm.evaluation.tables import facts_table, format_duration, format_power, goodput_table
from llm.training.files import write_atomically
from llm.training.goodput import find_goodput

_NUM_BEST = 3


def write_sweep_report(workdir: epath.Path, sweep: SweepConfig, results: Sequence[Result]) -> None:
    """Write the report of members, the best first as `read_results` gives them."""
    fields = varying_fields([result.member for result in results])
    decided = [] if sweep.halving is None else read_rungs(workdir)
    costs = {result.member.name: cost_of(sweep, result.member) for result in results}
    found = measured(results)
    sections = [_best_section(sweep, found, workdir)] if found else []
    sections.append(_members_section(sweep, results, fields, costs))
    if groups := over_seeds(found, fields, sweep.goal):
        sections.append(_seeds_section(sweep, groups, fields))
    if found:
        sections.append(_figures_section(sweep, found, fields, [rung["step"] for rung in decided]))
    if decided:
        sections.append(_halving_section(sweep, decided))
    failed = [result for result in results if result.state.startswith("failed")]
    if failed:
        sections.append(_failed_section(failed))
    runs = find_goodput(workdir)
    tables = (goodput_table(runs),) if runs else ()
    sections.append(Section("Made with", tables=(*tables, facts_table(version_facts()))))
    facts = _facts(sweep, results, total(list(costs.values())))
    title = f"Sweep: {sweep.stage} of {sweep.recipe}"
    report = Report(title, facts, tuple(sections), entry.command_line())
    write_report(report, workdir)
    _write_table(workdir, sweep, results, fields, costs)


def _facts(sweep: SweepConfig, results: Sequence[Result], cost: Cost) -> dict[str, str]:
    states = [result.state.partition(":")[0].partition(" at ")[0] for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    facts = {"members": f"{len(results)}: {counts}"}
    found = measured(results)
    if found:
        facts[f"best {sweep.metric}"] = f"{found[0].value:.4g}"
    if cost.flops is not None:
        facts["FLOPs of all to their ends"] = format_power(cost.flops)
    seconds = sum(result.seconds for result in results)
    if seconds:
        facts["time of members, summed"] = format_duration(seconds)
    return facts


def _best_section(sweep: SweepConfig, found: Sequence[Result], workdir: epath.Path) -> Section:
    rows = tuple(
        (
            i + 1,
            result.value,
            ", ".join(f"{k}={format_value(v)}" for k, v in result.member.fields.items()),
            str(workdir / result.member.name),
        )
        for i, result in enumerate(found[:_NUM_BEST])
    )
    text = f"By the last {sweep.metric}, {'least' if sweep.goal == 'min' else 'greatest'} first."
    return Section(
        "Best members", text, (Table(("Place", sweep.metric, "Fields", "Workdir"), rows, "", 4),)
    )


def _members_section(
    sweep: SweepConfig,
    results: Sequence[Result],
    fields: Sequence[str],
    costs: Mapping[str, Cost],
) -> Section:
    columns = (*fields, sweep.metric, "Step", "State", "Seconds", "FLOPs")
    rows = tuple(
        (
            *(format_value(result.member.fields.get(field)) for field in fields),
            result.value,
            result.step,
            result.state,
            f"{result.seconds:,.0f}" if result.seconds else "–",
            "–" if costs[result.member.name].flops is None
            else f"{costs[result.member.name].flops:.2e}",
        )
        for result in results
    )  # fmt: skip
    shared = {k: v for each in sweep.shared for k, v in each.items()}
    told = ", ".join(f"{k}={format_value(v)}" for k, v in shared.items())
    caption = f"All have {told}." if told else ""
    bold = frozenset({(0, len(fields))} if measured(results[:1]) else ())
    return Section("Members", tables=(Table(columns, rows, caption, 4, bold),))


def over_seeds(
    found: Sequence[Result], fields: Sequence[str], goal: str
) -> list[tuple[tuple[Any, ...], list[float]]]:
    """Return the metrics of members that are done and differ in seeds alone, by their other fields,
    the best mean first; nothing where no two do."""
    others, groups = _without_seeds(fields), {}
    for result in (each for each in found if each.state == "done"):
        key = tuple(format_value(result.member.fields.get(field)) for field in others)
        groups.setdefault(key, []).append(result.value)
    if max(map(len, groups.values()), default=0) < 2:
        return []
    sign = 1 if goal == "min" else -1
    return sorted(groups.items(), key=lambda group: sign * statistics.fmean(group[1]))


def _without_seeds(fields: Sequence[str]) -> list[str]:
    return [field for field in fields if field.rpartition(".")[2] != "seed"]


def _seeds_section(
    sweep: SweepConfig,
    groups: Sequence[tuple[tuple[Any, ...], Sequence[float]]],
    fields: Sequence[str],
) -> Section:
    rows = tuple(
        (
            *key,
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )
        for key, values in groups
    )
    columns = (*_without_seeds(fields), f"Mean {sweep.metric}", "Standard deviation", "Seeds")
    text = "Members that are done and differ in seeds alone, together; the best mean first."
    return Section("Over seeds", text, (Table(columns, rows, "", 4),))


def _figures_section(
    sweep: SweepConfig, found: Sequence[Result], fields: Sequence[str], rungs: Sequence[int]
) -> Section:
    fields = _without_seeds(fields)
    figures = [curves_figure(found, sweep.metric, sweep.goal, rungs)]
    if fields and len(found) > 1:
        figures.append(parallel_figure(found, fields, sweep.metric, sweep.goal))
    for field in fields:
        if any(field in result.member.fields for result in found):
            figures.append(field_figure(found, field, sweep.metric, sweep.goal))
    return Section("What the fields do", figures=tuple(figures))


def _halving_section(sweep: SweepConfig, decided: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for rung in decided:
        kept = [rung["values"][name] for name in rung["kept"]]
        ended = [x for name in rung["ended"] if (x := rung["values"][name]) is not None]
        pick = min if sweep.goal == "min" else max
        rows.append(
            (
                rung["step"],
                len(rung["values"]),
                len(rung["kept"]),
                kept[-1],
                pick(ended) if ended else None,
            )
        )
    columns = ("Step", "Members", "Went on", "Worst of those", "Best of those that ended")
    text = (
        "Successive halving (Jamieson and Talwalkar 2016): at each step of the table the best went "
        "on. A member that ended keeps its checkpoint. What a member would have come to later is "
        "not known; with a schedule that decays late, early values can mislead."
    )
    return Section("Early stopping", text, (Table(columns, tuple(rows), "", 4),))


def _failed_section(failed: Sequence[Result]) -> Section:
    samples = tuple(
        Sample("", result.tail, f"{result.member.name}: {result.state}") for result in failed
    )
    return Section("Failed members", "The last lines that each has printed.", samples=samples)


def _write_table(
    workdir: epath.Path,
    sweep: SweepConfig,
    results: Sequence[Result],
    fields: Sequence[str],
    costs: Mapping[str, Cost],
) -> None:
    """Write members.csv, a row a member, and summary.json with the same and the best."""
    rows = [
        {
            "member": result.member.name,
            **{field: result.member.fields.get(field) for field in fields},
            sweep.metric: result.value,
            "step": result.step,
            "state": result.state,
            "seconds": result.seconds,
            "flops": costs[result.member.name].flops,
        }
        for result in results
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(workdir / "members.csv", stream.getvalue())
    best = measured(results)[:1]
    summary = {
        "metric": sweep.metric,
        "best": best[0].member.name if best else None,
        "best_value": best[0].value if best else None,
        "members": rows,
        "rungs": read_rungs(workdir),
    }
    write_atomically(workdir / "summary.json", json.dumps(entry.plain(summary), indent=1))
