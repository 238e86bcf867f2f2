"""Answer BIG-bench tasks with any of our models, beside what chance would score.

    python -m experiments.bigbench --model=smollm2 --tasks=emoji_movie,arithmetic --limit=50
    python -m experiments.bigbench --model=runs/tiny --tasks='logical_*' --num_shots=3 --json
    python -m experiments.bigbench --model=hf_directory --path=my_tasks --tasks='*' --output=a.jsonl
    python -m experiments.bigbench --list [--tasks='unit_*']

Tasks are those of BIG-bench 1.0.0, fetched once (358 MB, 1.8 GB unpacked), or the task.json files
below --path. They are for evaluation only: their canary asks to keep them out of training corpora.
A task with subtasks stands for all of them; one of them is task:subtask. Prompts and shots are the
reference's for the same --seed. Metrics: multiple_choice_grade, Brier score, macro_f1; exact,
case-insensitive and numeric match; log_likelihood. Tasks measured only by others (BLEU, ROUGE,
BLEURT, sequence_f1) are named and skipped.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
from absl import flags
from etils import epath

from experiments import entry
from experiments.loading import load_model
from llm.data.rows import tell_rows
from llm.evaluation.batched import BatchedModel
from llm.evaluation.bigbench import TaskResult, combine_results, evaluate_task
from llm.evaluation.bigbench_tasks import (
    REFERENCE_SEED,
    Task,
    TaskError,
    find_tasks,
    is_packaged_here,
    packaged_folder,
    read_task,
    select_tasks,
)
from llm.models.config import ComputeConfig
from llm.models.transformer import Transformer
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh

_MODEL = flags.DEFINE_string(
    "model", None, "A workdir, a Hugging Face directory, a GGUF file, or 'smollm2'."
)
_TASKS = flags.DEFINE_list("tasks", [], "Names of tasks or subtasks, with commas; * and ? match.")
_PATH = flags.DEFINE_string("path", None, "A folder of task.json files; default: BIG-bench's own.")
_LIST = flags.DEFINE_boolean("list", False, "Print names; with --tasks, what these ask; and stop.")
_SHOTS = flags.DEFINE_integer("num_shots", 0, "Solved examples before each question.", 0)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "So many questions of each task and subtask, drawn by the seed.", 1
)
_NEW = flags.DEFINE_integer(
    "max_new_tokens", None, "Of a written answer; default: as the task's longest target needs.", 1
)
_LENGTH = flags.DEFINE_integer("max_length", None, "Window in tokens; default: the model's.", 2)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Requests at a time.", 1)
_SEED = flags.DEFINE_integer(
    "seed", REFERENCE_SEED, "Draws questions, shots and the order of choices.", 0, 2**32 - 1
)
_BAD = flags.DEFINE_integer("max_bad_examples", 100, "Left out of a task before it is refused.", 0)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "A file for every example's prompt, answer and scores: a JSON object a line."
)
_JSON = entry.define_json()


def main() -> None:
    if not _LIST.value:
        _check_flags()  # before anything is fetched
    if not _PATH.value and not is_packaged_here():
        print("fetching BIG-bench once: 358 MB, 1.8 GB unpacked", file=sys.stderr, flush=True)
    files = find_tasks(_PATH.value or packaged_folder())
    try:
        names = select_tasks(files, _TASKS.value)
    except TaskError as error:
        raise TaskError(f"--tasks={error}; --list prints the names") from error
    if _LIST.value:
        _list_tasks({name: files[name] for name in names or files}, details=bool(names))
        return
    model = _load_batched_model()
    results, tasks, skipped = _evaluate(model, {name: files[name] for name in names})
    if not results:
        raise ValueError(f"nothing could be scored: {'; '.join(skipped.values())}")
    rows = _with_groups(results)
    if _JSON.value:
        report = {
            "model": _MODEL.value,
            "num_shots": _SHOTS.value,
            "limit": _LIMIT.value,
            "seed": _SEED.value,
            "tasks": {row.name: _figures(row, tasks.get(row.name), files) for row in rows},
            "skipped": skipped,
        }
        entry.print_json(report)
        return
    _show(rows, tasks, skipped, files)


def _check_flags() -> None:
    if not _TASKS.value:
        raise ValueError("give --tasks=NAME,…: --list prints the names")
    if not _MODEL.value:
        raise ValueError("give --model=SOURCE: a workdir, a Hugging Face directory, …")
    if _OUTPUT.value and not epath.Path(_OUTPUT.value).parent.is_dir():
        raise FileNotFoundError(f"--output={_OUTPUT.value}: its folder does not exist")


def _load_batched_model() -> BatchedModel:
    config, params, tokenizer, _ = load_model(_MODEL.value)
    if _LENGTH.value and config.positions == "learned" and _LENGTH.value > config.max_length_tokens:
        raise ValueError(
            f"--max_length={_LENGTH.value}: the model has {config.max_length_tokens} positions"
        )
    return BatchedModel(
        Transformer(config, ComputeConfig(dtype=_DTYPE.value)),
        params,
        tokenizer,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        max_length=_LENGTH.value,
        batch_size=_BATCH.value,
    )


def _evaluate(
    model: BatchedModel, files: Mapping[str, epath.Path]
) -> tuple[list[TaskResult], dict[str, Task], dict[str, str]]:
    """Return results without their answers, the tasks by name, and why others were skipped."""
    results, tasks, skipped = [], {}, {}
    with contextlib.ExitStack() as stack:
        output = _OUTPUT.value and stack.enter_context(epath.Path(_OUTPUT.value).open("w"))
        for name, file in files.items():
            started = time.monotonic()
            try:
                task = read_task(name, file, seed=_SEED.value, max_bad_examples=_BAD.value)
                result = evaluate_task(
                    model,
                    task,
                    num_shots=_SHOTS.value,
                    limit=_LIMIT.value,
                    seed=_SEED.value,
                    max_new_tokens=_NEW.value,
                )
            except TaskError as error:
                skipped[name] = str(error)
                continue
            for answer in result.answers if output else ():
                line = json.dumps(entry.plain(dataclasses.asdict(answer)), ensure_ascii=False)
                output.write(line + "\n")
            results.append(dataclasses.replace(result, answers=()))
            tasks[name] = dataclasses.replace(task, examples=())
            seconds = time.monotonic() - started
            done = f"{name}: {result.num_examples} examples in {seconds:.1f} s"
            print(f"[{len(results) + len(skipped)}/{len(files)}] {done}", file=sys.stderr)
    return results, tasks, skipped


def _with_groups(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Return the results with that of a task after those of its subtasks, if they are several."""
    rows: list[TaskResult] = []
    groups = itertools.groupby(results, lambda result: result.name.partition(":")[0])
    for name, group in groups:
        members = list(group)
        rows += members
        if len(members) > 1:
            rows.append(combine_results(name, members))
    return rows


def _subtasks(name: str, files: Iterable[str]) -> int:
    """Return how many subtasks a task has."""
    return sum(file.startswith(f"{name}:") for file in files)


def _figures(result: TaskResult, task: Task | None, files: Iterable[str]) -> dict:
    """Return what --json tells of a task or subtask, or of several together."""
    figures = {
        "examples": result.num_examples,
        "metric": result.metric,
        "normalised": result.normalised,
        "scores": {
            metric: {
                "score": score.value,
                "random": score.random,
                "standard_error": score.standard_error,
            }
            for metric, score in result.scores.items()
        },
        "cut_contexts": result.cut_contexts,
    }
    if task is None:
        figures["subtasks"] = _subtasks(result.name, files)
        figures["subtasks_scored"] = result.num_tasks
    else:
        figures["metrics_not_computed"] = task.unknown_metrics
        figures["duplicates"] = task.duplicates
        figures["bad_examples"] = [str(row) for row in task.bad_examples]
    return figures


def _show(
    rows: Sequence[TaskResult],
    tasks: Mapping[str, Task],
    skipped: Mapping[str, str],
    files: Iterable[str],
) -> None:
    table = [("task", "examples", "metric", "score", "random", "std. error")]
    together = {row.name for row in rows if row.name not in tasks}
    for row in rows:
        label = row.name
        if row.name in together:
            label += f" ({row.num_tasks} of {_subtasks(row.name, files)} subtasks)"
        for metric, score in row.scores.items():
            if row.name.partition(":")[0] in together - {row.name} and metric != row.metric:
                continue  # the row of all subtasks tells the others
            figures = (score.value, score.random, score.standard_error)
            texts = ("–" if figure is None else f"{figure:.4f}" for figure in figures)
            table.append((label, f"{row.num_examples:,}", metric, *texts))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, examples, metric, *numbers in table:
        cells = [name.ljust(widths[0]), examples.rjust(widths[1]), metric.ljust(widths[2])]
        print("  ".join(cells + [n.rjust(w) for n, w in zip(numbers, widths[3:], strict=True)]))
    for name, task in tasks.items():
        if task.bad_examples:
            print(f"{name}: {tell_rows(task.bad_examples, 'bad examples left out')}")
        if task.duplicates:
            print(f"{name}: {task.duplicates} repeated examples left out")
        if task.unknown_metrics:
            print(f"{name}: {', '.join(task.unknown_metrics)} not computed")
    for row in rows:
        if row.cut_contexts and row.name in tasks:
            print(f"{row.name}: {row.cut_contexts} prompts lost their beginning to the window")
    if skipped:
        print(f"{len(skipped)} skipped:")
    for reason in skipped.values():
        print(f"  {reason}")


def _list_tasks(files: Mapping[str, epath.Path], details: bool) -> None:
    """Print names, with counts of subtasks; or what each of them asks and is measured by."""
    if _JSON.value and not details:
        entry.print_json({"tasks": list(files)})
        return
    if not details:
        for name, count in collections.Counter(n.partition(":")[0] for n in files).items():
            print(name if name in files else f"{name}  {count} subtasks, {name}:*")
        return
    found = {}
    for name, file in files.items():
        task = read_task(name, file, seed=_SEED.value, max_bad_examples=_BAD.value)
        found[name] = {
            "examples": len(task.examples),
            "metrics": task.metrics,
            "metrics_not_computed": task.unknown_metrics,
            "description": task.description,
        }
    if _JSON.value:
        entry.print_json({"tasks": found})
        return
    for name, row in found.items():
        others = ", ".join(row["metrics_not_computed"])
        known = ", ".join(row["metrics"]) or f"no metric that is computed here ({others})"
        print(f"{name}: {row['examples']:,} examples, {known}. {row['description']}".strip())


if __name__ == "__main__":
    entry.run(main)
