"""Train small models in which a skill emerges, score it three ways, and write a report.

    python -m experiments.emergence --config=configs/emergence.py --workdir=runs/emergence
    python -m experiments.emergence --config=configs/emergence.py:grokking --workdir=runs/grokking

Phenomena: grokking, addition, induction heads, multitask sparse parity, few-shot learning; a
section of the config each. Called again it goes on where it stopped. Every evaluation of every run
is a row of {phenomenon}.csv and .parquet.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.parquet
from etils import epath

from configs.schema import EmergenceConfig
from experiments import entry
from experiments.ladder import write_table
from experiments.phenomena.addition import addition_groups, describe_addition
from experiments.phenomena.common import Findings, Row, StudyGroup, train_study
from experiments.phenomena.few_shot import describe_few_shot, few_shot_groups
from experiments.phenomena.grokking import describe_grokking, grokking_groups
from experiments.phenomena.induction import describe_induction, induction_groups
from experiments.phenomena.parity import describe_parity, parity_groups
from experiments.run_flags import start_processes
from experiments.stages import open_job
from experiments.workdir_flag import WORKDIR
from llm.evaluation.facts import hardware_facts, version_facts
from llm.evaluation.report import Report, Section, write_report
from llm.evaluation.tables import (
    facts_table,
    format_duration,
    goodput_table,
    wall_time_table,
)
from llm.training.files import write_atomically
from llm.training.goodput import find_goodput, sum_goodput


def studies(
    config: EmergenceConfig,
) -> dict[str, tuple[Any, Callable[..., Iterator[StudyGroup]], Callable[..., Findings]]]:
    """Return, by phenomenon, its section of the config, its groups, and what tells of the rows."""
    every = {
        "grokking": (config.grokking, grokking_groups, describe_grokking),
        "addition": (config.addition, addition_groups, describe_addition),
        "induction": (config.induction, induction_groups, describe_induction),
        "parity": (config.parity, parity_groups, describe_parity),
        "few_shot": (config.few_shot, few_shot_groups, describe_few_shot),
    }
    return {name: study for name, study in every.items() if study[0] is not None}


def main(config: EmergenceConfig) -> None:
    start_processes(config, only_one=True)
    workdir = epath.Path(WORKDIR.value)
    stages = open_job(workdir, config, allow_change=config.run.allow_config_change)

    findings: dict[str, Findings] = {}
    for name, (section, groups_of, describe) in studies(config).items():

        def study(name=name, groups_of=groups_of, section=section) -> None:
            groups = groups_of(section, config)
            write_table(train_study(groups, section, config, workdir / name), workdir / name)

        stages.run(name, study)
        findings[name] = describe(section, read_table(workdir / name))
    write_emergence_report(workdir, findings, stages.wall_seconds)
    print(f"report: {workdir / 'report.html'} (and report.md, summary.json, a table a phenomenon)")


def read_table(path: epath.Path) -> list[Row]:
    """Return the rows of path.parquet, without empty cells."""
    with (path.parent / f"{path.name}.parquet").open("rb") as file:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    return [{name: x for name, x in row.items() if x is not None} for row in rows]


def write_emergence_report(
    workdir: epath.Path, findings: dict[str, Findings], wall_seconds: dict[str, float]
) -> None:
    """Write report.md, report.html and summary.json."""
    hardware, versions, runs = hardware_facts(), version_facts(), find_goodput(workdir)
    summary: dict[str, Any] = {name: found.summary for name, found in findings.items()}
    summary["goodput"] = sum_goodput(runs.values()).goodput
    summary |= {
        "wall_seconds": wall_seconds,
        "hardware": hardware,
        "versions": versions,
    }
    write_atomically(workdir / "summary.json", json.dumps(entry.plain(summary), indent=1))
    sections = (
        *(found.section for found in findings.values()),
        Section("Wall time", tables=(wall_time_table(wall_seconds), goodput_table(runs))),
        Section("Made with", tables=(facts_table(hardware), facts_table(versions))),
    )
    headline = {
        "phenomena": ", ".join(findings),
        "wall time": format_duration(wall_seconds["total"]),
        "config": "config.json, overrides included",
    }
    command = entry.command_line()
    write_report(Report("Emergence in small models", headline, sections, command), workdir)


if __name__ == "__main__":
    entry.run(main, EmergenceConfig, default_config="configs/emergence.py")
