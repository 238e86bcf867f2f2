"""BIG-bench's JSON tasks: what they ask, and the n-shot prompts made of it. Third floor.

For evaluation only: each task's canary string asks to keep it out of training corpora.

Source: Srivastava et al. 2022, arXiv:2206.04615; prompts, shots and their draws are those of
`bigbench` 1.0.0 (api/json_task.py) for the same seed. Where this differs: an example that has no
input, no right answer or an empty one is left out and counted, and a limit holds for each subtask.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llm.data.config import cache_root
from llm.data.packages import PACKAGES, fetch_package
from llm.data.rows import BadRow, nearest, tell_rows
from llm.evaluation.bigbench_metrics import (
    CHOICE_METRICS,
    LIKELIHOOD_METRICS,
    METRICS,
    TEXT_METRICS,
)

REFERENCE_SEED = 42
DEFAULT_REGEX = r"[^\.\?\!\;\n]+"  # what an answer is where the task does not say


class TaskError(ValueError):
    """A BIG-bench task is missing, cannot be read, or has too few examples for what is asked."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How a task's prompts are put together, and what of a written answer counts."""

    task_prefix: str = ""
    example_input_prefix: str = "\nQ: "
    example_output_prefix: str = "\nA: "
    choice_prefix: str = "\n  choice: "
    few_shot_example_separator: str = "\n"
    append_choices_to_input: bool = True
    output_regex: str | None = None
    stop_string: str | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """A question of a task."""

    number: int  # its place in the task's file, from 1
    query: str  # the input between the task's prefixes, with the choices where they are listed
    targets: tuple[str, ...]
    choices: tuple[str, ...]  # empty where the answer is to be written
    scores: tuple[float, ...]  # of the choices: the highest is right
    identity: str  # equal for examples that say the same


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, or one subtask, as its file states it."""

    name: str
    description: str
    examples: tuple[Example, ...]
    metrics: tuple[str, ...]  # asked for and known here, the preferred one first
    unknown_metrics: tuple[str, ...]  # asked for and not known here
    format: Format
    bad_examples: tuple[BadRow, ...]
    duplicates: int  # examples left out since they repeat another

    @property
    def has_choices(self) -> bool:
        return any(metric in CHOICE_METRICS for metric in self.metrics)

    @property
    def has_texts(self) -> bool:
        return any(metric in TEXT_METRICS for metric in self.metrics)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers an example."""

    example: Example
    shots: tuple[int, ...]  # numbers of the examples before it
    text: str


# --- Files ----------------------------------------------------------------------------------


def packaged_folder() -> epath.Path:
    """Return the folder of BIG-bench's own tasks: 1.8 GB, fetched (358 MB) on the first call."""
    return epath.Path(fetch_package("bigbench")) / "bigbench" / "benchmark_tasks"


def is_packaged_here() -> bool:
    """Whether the package has been fetched before."""
    return any((cache_root() / "packages").glob(f"bigbench-{PACKAGES['bigbench'].version}-*"))


def find_tasks(folder: epath.PathLike) -> dict[str, epath.Path]:
    """Return the task.json files in a folder, by name; a subtask's is "task:subtask".

    They lie in the folder itself, in folders of it, or in folders of a task without examples.

    Raises:
      TaskError: there is none.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise TaskError(f"{folder} is not a folder of BIG-bench tasks")
    if (folder / "task.json").exists():
        tops = [folder]
    else:
        tops = sorted(path for path in folder.iterdir() if path.is_dir())
    found: dict[str, epath.Path] = {}
    for top in tops:
        file, below = top / "task.json", sorted(top.glob("*/task.json"))
        if below and not (file.exists() and "examples" in _load(file)):
            found |= {f"{top.name}:{sub.parent.name}": sub for sub in below}
        elif file.exists():
            found[top.name] = file
    if not found:
        raise TaskError(f"{folder} has no task.json, NAME/task.json or NAME/SUBTASK/task.json")
    return found


def select_tasks(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that any pattern matches, itself or by its task: in their own order.

    Raises:
      TaskError: a pattern matches none; names the nearest.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name.partition(":")[0], pattern)
        }
        if not hits:
            known = list(dict.fromkeys([n.partition(":")[0] for n in names] + names))
            raise TaskError(f"{pattern}: no such task{nearest(pattern, known)}")
        chosen |= hits
    return [name for name in names if name in chosen]


def read_task(
    name: str, file: epath.PathLike, *, seed: int = REFERENCE_SEED, max_bad_examples: int = 100
) -> Task:
    """Return a task from its file. The seed shuffles the choices that a question lists.

    Raises:
      TaskError: the file is not a task's, or has more than `max_bad_examples` bad examples.
    """
    data = _load(file)
    if "examples" not in data:
        raise TaskError(f"{file} has neither examples nor subtasks in folders beside it")
    if not isinstance(data["examples"], list) or not isinstance(data.get("metrics"), list):
        raise TaskError(f"{file}: examples and metrics must be lists")
    asked = list(dict.fromkeys(map(str, [data.get("preferred_score"), *data["metrics"]])))
    known = tuple(metric for metric in asked if metric in METRICS)
    how = _read_format(data, file)
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: set[str] = set()
    for number, raw in enumerate(data["examples"], 1):
        spelled = json.dumps(raw)
        if spelled in seen:
            continue
        seen.add(spelled)
        try:
            examples.append(_make_example(how, known, seed, number, raw))
        except _BadExample as error:
            bad.append(BadRow(str(file), number, str(error)))
    if len(bad) > max_bad_examples:
        raise TaskError(
            f"{tell_rows(bad, f'bad examples, more than {max_bad_examples}')}; "
            "mend the file, or allow more"
        )
    return Task(
        name=name,
        description=str(data.get("description", "")),
        examples=tuple(examples),
        metrics=known,
        unknown_metrics=tuple(str(m) for m in data["metrics"] if m not in METRICS),
        format=how,
        bad_examples=tuple(bad),
        duplicates=len(data["examples"]) - len(seen),
    )


def _read_format(data: Mapping[str, Any], file: epath.PathLike) -> Format:
    given = {}
    for field in dataclasses.fields(Format):
        value = data.get(field.name)
        if value is not None:
            if not isinstance(value, bool if field.name == "append_choices_to_input" else str):
                raise TaskError(f"{file}: {field.name} is {value!r}, of the wrong type")
            given[field.name] = value
    regex = given.get("output_regex")
    if regex is None and "stop_string" not in given:
        regex = DEFAULT_REGEX
    try:
        groups = re.compile(regex or "").groups
    except re.error as error:
        raise TaskError(f"{file}: output_regex {regex!r} cannot be read: {error}") from error
    if groups > 1:
        raise TaskError(f"{file}: output_regex {regex!r} has {groups} groups; it may have one")
    return Format(**(given | {"output_regex": regex or None}))


def _load(file: epath.PathLike) -> dict[str, Any]:
    try:
        data = json.loads(epath.Path(file).read_text())
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise TaskError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return data


# --- Examples -------------------------------------------------------------------------------


class _BadExample(Exception):
    """An example that cannot be asked or answered; says why."""


def _make_example(how: Format, metrics: Sequence[str], seed: int, number: int, raw: Any) -> Example:
    if not isinstance(raw, dict) or not isinstance(raw.get("input"), str):
        raise _BadExample("has no input text")
    query, choices, scores = raw["input"], (), ()
    if "target_scores" in raw:
        choices, scores = _check_choices(raw["target_scores"])
        if how.append_choices_to_input:
            listed = sorted(choices)
            order = _shuffled(len(listed), seed)
            query += "".join(how.choice_prefix + listed[i] for i in order)
    elif any(metric in CHOICE_METRICS for metric in metrics):
        raise _BadExample("has no target_scores to choose by")
    targets = raw.get("target")
    if targets is None:
        if not choices or any(metric in TEXT_METRICS + LIKELIHOOD_METRICS for metric in metrics):
            raise _BadExample("has no target")
        targets = choices[scores.index(max(scores))]
    targets = tuple(targets) if isinstance(targets, list) else (targets,)
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise _BadExample("has an empty target, which silence would match, or one that is no text")
    query = how.example_input_prefix + query + how.example_output_prefix
    whole = {**raw, "input": query, "target": targets, "choice": choices}
    identity = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return Example(number, query, targets, choices, scores, identity)


def _check_choices(target_scores: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if not isinstance(target_scores, dict) or not target_scores:
        raise _BadExample("has no choices")
    choices, scores = tuple(target_scores), tuple(target_scores.values())
    if "" in choices:
        raise _BadExample("has an empty choice, which no model can find unlikely")
    if not all(isinstance(score, (int, float)) and 0 <= score < math.inf for score in scores):
        raise _BadExample("has a choice whose score is negative or not a number")
    if max(scores) <= (min(scores) if len(scores) > 1 else 0):
        raise _BadExample("has no choice that is right")
    return choices, tuple(float(score) for score in scores)


@functools.cache
def _shuffled(count: int, seed: int) -> tuple[int, ...]:
    """Return the one order in which every example of so many choices lists them."""
    return tuple(np.random.RandomState(seed).permutation(count).tolist())


# --- Prompts --------------------------------------------------------------------------------


def draw_prompts(
    task: Task, num_shots: int, *, limit: int | None = None, seed: int = REFERENCE_SEED
) -> list[Prompt]:
    """Return the task's prompts, or `limit` drawn ones, each after other examples with answers.

    An example, or one that says the same, is never among its own shots.

    Raises:
      TaskError: there are too few examples.
    """
    # RandomState: NumPy keeps its stream for ever, and the reference draws from it
    random, count = np.random.RandomState(seed), len(task.examples)
    asked = count if limit is None else min(limit, count)
    if num_shots == 0:
        order = range(count) if asked == count else random.choice(count, asked, replace=False)
        return [
            Prompt(example, (), task.format.task_prefix + example.query)
            for example in (task.examples[i] for i in order)
        ]
    identities = np.asarray([example.identity for example in task.examples])
    if len(set(identities.tolist())) < num_shots + 1:
        raise TaskError(f"{task.name} has {count} examples, too few for {num_shots} shots")
    prompts = []
    for i in random.choice(count, asked, replace=False):
        others = np.flatnonzero(identities != identities[i])
        shots = [task.examples[j] for j in random.choice(others, num_shots, replace=False)]
        solved = [shot.query + shot.targets[random.choice(len(shot.targets))] for shot in shots]
        text = task.format.few_shot_example_separator.join([*solved, task.examples[i].query])
        numbers = tuple(shot.number for shot in shots)
        prompts.append(Prompt(task.examples[i], numbers, task.format.task_prefix + text))
    return prompts
