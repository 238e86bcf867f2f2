"""Small BIG-bench tasks, and how a test writes one."""

import json

from llm.evaluation.bigbench_tasks import read_task

COLOURS = {
    "name": "colours",
    "description": "Name a colour.",
    "metrics": ["multiple_choice_grade"],
    "preferred_score": "multiple_choice_grade",
    "examples": [
        {"input": "The sky?", "target_scores": {"blue": 1, "red": 0, "cyan": 1}},
        {"input": "Grass?", "target_scores": {"red": 0, "green": 1, "grey": 0.5}},
        {"input": "Snow?", "target_scores": {"white": 1, "black": 0, "pink": 0}},
        {"input": "Coal?", "target_scores": {"white": 0, "black": 1, "blue": 0, "ash": 0}},
    ],
}
SUMS = {
    "name": "sums",
    "metrics": ["exact_str_match"],
    "preferred_score": "exact_str_match",
    "task_prefix": "Add.\n",
    "example_input_prefix": "",
    "example_output_prefix": "=",
    "few_shot_example_separator": "; ",
    "stop_string": "\n",
    "examples": [
        {"input": "1+1", "target": "2"},
        {"input": "2+3", "target": ["5", "five"]},
        {"input": "4+4", "target": "8"},
    ],
}


def write_task(folder, task, *, max_bad_examples=100, **changes):
    """Write a task, some of its fields changed, and return what is read of it."""
    file = folder / task["name"] / "task.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**task, **changes}))
    return read_task(task["name"], file, max_bad_examples=max_bad_examples)
