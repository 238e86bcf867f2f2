"""experiments.bigbench as a user runs it, on task files of its own."""

import json
import subprocess
import sys

import jax
import pytest

from llm.data.tokenizer_training import byte_tokenizer
from llm.interop.huggingface import save_huggingface
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params

CHOICES = {
    "description": "Which is it?",
    "metrics": ["multiple_choice_grade"],
    "append_choices_to_input": False,
    "examples": [
        {"input": "One?", "target_scores": {"yes": 1, "no": 0}},
        {"input": "Two?", "target_scores": {"yes": 0, "no": 1, "maybe": 0, "never": 0}},
        {"input": "Three?", "target_scores": {}},
        {"input": "Four?", "target_scores": {"yes": 1, "no": 0}},
    ],
}
TEXTS = {"metrics": ["exact_str_match"], "examples": [{"input": "1+1", "target": "2"}] * 2}
TASKS = {"choices/one": CHOICES, "choices/two": CHOICES, "texts": TEXTS}
TASKS |= {"summaries": {"metrics": ["rouge"], "examples": []}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer on bytes and some tasks, one of them not JSON."""
    folder = tmp_path_factory.mktemp("bigbench")
    tokenizer = byte_tokenizer()
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=24,
        max_length_tokens=64,
    )
    params = jax.jit(lambda key: init_params(Transformer(config), key))(jax.random.key(0))
    save_huggingface(folder / "model", config, jax.device_get(params), tokenizer)
    for path, task in TASKS.items():
        (folder / "tasks" / path).mkdir(parents=True)
        (folder / "tasks" / path / "task.json").write_text(json.dumps(task))
    (folder / "tasks" / "broken").mkdir()
    (folder / "tasks" / "broken" / "task.json").write_text('{"examples": [')
    return folder


def run(folder, *flags, expect=0):
    command = [sys.executable, "-m", "experiments.bigbench", f"--path={folder / 'tasks'}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr
    return done.stdout, done.stderr


def test_scores_beside_chance_and_every_answer(folder):
    flags = [f"--model={folder / 'model'}", "--tasks=*", f"--output={folder / 'answers.jsonl'}"]
    out, _ = run(folder, *flags, "--json")
    report = json.loads(out)
    tasks = report["tasks"]
    assert list(tasks) == ["choices:one", "choices:two", "choices", "texts"]
    one, both = tasks["choices:one"], tasks["choices"]
    grade = one["scores"]["multiple_choice_grade"]
    assert (one["examples"], one["metric"]) == (3, "multiple_choice_grade")
    assert grade["random"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    assert both["scores"]["multiple_choice_grade"]["random"] == pytest.approx(grade["random"])
    assert (both["examples"], both["subtasks_scored"], both["subtasks"]) == (6, 2, 2)
    assert one["bad_examples"] == [f"{folder}/tasks/choices/one/task.json:3 has no choices"]
    assert tasks["texts"]["scores"]["exact_str_match"]["random"] == 0.0
    assert tasks["texts"]["duplicates"] == 1
    assert "is not valid JSON" in report["skipped"]["broken"]
    assert report["skipped"]["summaries"].startswith("summaries is measured by rouge")
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(row["task"], row["example"]) for row in rows] == [
        *(("choices:one", n) for n in (1, 2, 4)), *(("choices:two", n) for n in (1, 2, 4)),
        ("texts", 1),
    ]  # fmt: skip
    assert rows[0]["prompt"] == "\nQ: One?\nA: " and set(rows[0]["log_likelihoods"]) == {
        "yes",
        "no",
    }
    mean = sum(row["scores"]["multiple_choice_grade"] for row in rows[:3]) / 3
    assert grade["score"] == pytest.approx(mean)
    assert rows[-1]["targets"] == ["2"] and isinstance(rows[-1]["response"], str)


def test_a_table_of_few_shot_scores(folder):
    flags = [f"--model={folder / 'model'}", "--tasks=choices,texts", "--num_shots=2", "--limit=2"]
    out, progress = run(folder, *flags)
    lines = out.splitlines()
    assert lines[0].split() == ["task", "examples", "metric", "score", "random", "std.", "error"]
    assert lines[1].split()[:3] == ["choices:one", "2", "multiple_choice_grade"]
    assert lines[3].startswith("choices (2 of 2 subtasks)")
    assert "choices:one: 1 bad examples left out: " in out
    assert lines[-2:] == ["1 skipped:", "  texts has 1 examples, too few for 2 shots"]
    assert "[1/3] choices:one: 2 examples in " in progress


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=choicse", "--model=none"], "--tasks=choicse: no such task; did you mean choic"),
        (["--tasks=broken", "--model={model}"], "broken/task.json is not valid JSON"),
    ],
)
def test_a_mistake_is_one_line(folder, flags, message):
    flags = [flag.format(model=folder / "model") for flag in flags]
    _, error = run(folder, *flags, expect=2)
    assert message in error and error.count("\n") == 1, error


def test_a_list_of_tasks(folder):
    names, _ = run(folder, "--list")
    assert names.splitlines() == [
        "broken", "choices  2 subtasks, choices:*", "summaries", "texts",
    ]  # fmt: skip
    asked, _ = run(folder, "--list", "--tasks=choices:one,summaries")
    assert asked.splitlines() == [
        "choices:one: 3 examples, multiple_choice_grade. Which is it?",
        "summaries: 0 examples, no metric that is computed here (rouge).",
    ]
