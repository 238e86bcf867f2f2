"""Train ladders of models, fit scaling laws to them, and write a report.

    python -m experiments.scaling --config=configs/scaling.py --workdir=runs/scaling [--dry_run]

The runs are listed with their FLOPs and predicted cost before the first one starts; called again
it goes on where it stopped. Every evaluation of every run is a row of evaluations.csv and .parquet,
the last of each of runs.csv, which `experiments.fit` takes.
"""

import json

from absl import flags
from etils import epath

from configs.schema import ScalingConfig
from experiments import entry
from experiments.ladder import (
    Prediction,
    evaluation_rows,
    final_rows,
    groups_of,
    predict,
    train_group,
    write_table,
)
from experiments.run_flags import start_processes
from experiments.scaling_report import write_scaling_report
from experiments.stages import open_job
from experiments.workdir_flag import WORKDIR
from llm.data.disk import read_json_object
from llm.data.prepare import prepare
from llm.data.tokenizer_training import make_tokenizer
from llm.evaluation.tables import format_duration
from llm.scaling.ladder import Group
from llm.training.files import write_atomically

_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "List the runs and stop.")


def main(config: ScalingConfig) -> None:
    start_processes(config, only_one=True)
    workdir = epath.Path(WORKDIR.value)
    stages = open_job(workdir, config, allow_change=config.run.allow_config_change)

    tokenizer = make_tokenizer(config.data)
    prepared = prepare(config.data, tokenizer)
    groups = groups_of(config, tokenizer.vocab_size)
    costs = predicted(config, groups, workdir)
    print(listing(groups, costs))
    if _DRY_RUN.value:
        return

    for i, group in enumerate(groups):
        left = format_duration(seconds_left(groups, i, costs, stages.wall_seconds))
        print(f"group {i + 1} of {len(groups)}, about {left} left in all")
        stages.run(group.name, lambda group=group: train_group(config, group, workdir))

    rows = evaluation_rows(config, groups, prepared, workdir)
    write_table(rows, workdir / "evaluations")
    write_table(final_rows(rows), workdir / "runs")
    write_scaling_report(workdir, config, rows, stages.wall_seconds)
    print(f"report: {workdir / 'report.html'} (and report.md, evaluations.csv, runs.csv)")


def predicted(
    config: ScalingConfig, groups: list[Group], workdir: epath.Path
) -> dict[str, Prediction]:
    """Return what each group will take, tried out once and kept in the workdir."""
    file = workdir / "predicted.json"
    if file.exists():
        found = {name: Prediction(*each) for name, each in read_json_object(file).items()}
        if set(found) == {group.name for group in groups}:
            return found
    print("trying out a step of each shape …")
    found = predict(config, groups)
    write_atomically(file, json.dumps(found, indent=1))
    return found


def seconds_left(
    groups: list[Group], done: int, costs: dict[str, Prediction], wall_seconds: dict[str, float]
) -> float:
    """Return what is predicted of the groups not done, at the pace of those that are."""
    predicted = [costs[group.name].seconds for group in groups]
    taken = sum(wall_seconds[group.name] for group in groups[:done])
    pace = taken / sum(predicted[:done]) if done else 1.0
    return pace * sum(predicted[done:])


def listing(groups: list[Group], costs: dict[str, Prediction]) -> str:
    """Return the groups as lines of text: their runs, and what they will take."""
    columns = "{:44} {:>4} {:>6} {:>13} {:>9} {:>8} {:>10}"
    head = ("group", "runs", "width", "tokens a run", "FLOPs", "memory", "time")
    lines = [columns.format(*head)]
    for group in groups:
        seconds, num_bytes = costs[group.name]
        cells = (
            group.name,
            len(group.members),
            group.model.width,
            f"{group.num_tokens:,}",
            f"{group.flops:.2e}",
            f"{num_bytes / 1e9:.2f} GB",
            format_duration(seconds),
        )
        lines.append(columns.format(*cells))
    runs, flops = sum(len(group.members) for group in groups), sum(g.flops for g in groups)
    total = format_duration(sum(cost.seconds for cost in costs.values()))
    most = max(cost.num_bytes for cost in costs.values())
    lines.append(columns.format("all", runs, "", "", f"{flops:.2e}", f"{most / 1e9:.2f} GB", total))
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main, ScalingConfig, default_config="configs/scaling.py")
