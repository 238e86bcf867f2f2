"""BIG-bench task files, and prompts as the reference makes them."""

import functools
import json

import pytest

from llm.evaluation.bigbench_tasks import (
    TaskError,
    draw_prompts,
    find_tasks,
    is_packaged_here,
    packaged_folder,
    read_task,
    select_tasks,
)
from tests.evaluation.bigbench_files import COLOURS, SUMS, write_task


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_task, tmp_path)


# --- Prompts: the reference's, whose own code made these strings -----------------------------


def test_prompts_of_choices(write):
    task = write(COLOURS)
    assert [prompt.text for prompt in draw_prompts(task, 0)][0] == (
        "\nQ: The sky?\n  choice: blue\n  choice: cyan\n  choice: red\nA: "
    )
    (prompt,) = draw_prompts(task, 2, limit=1)
    assert prompt.text == (
        "\nQ: The sky?\n  choice: blue\n  choice: cyan\n  choice: red\nA: blue\n"
        "\nQ: Snow?\n  choice: black\n  choice: pink\n  choice: white\nA: white\n"
        "\nQ: Grass?\n  choice: green\n  choice: grey\n  choice: red\nA: "
    )
    assert prompt.shots == (1, 3) and prompt.example.number == 2
    changed = write(COLOURS, choice_prefix=" | ", example_input_prefix="", task_prefix="Pick. ")
    assert draw_prompts(changed, 0)[3].text == "Pick. Coal? | black | white | ash | blue\nA: "
    plain = write(COLOURS, append_choices_to_input=False)
    assert draw_prompts(plain, 0)[3].text == "\nQ: Coal?\nA: "


@pytest.mark.parametrize(
    "shots, limit, seed, texts",
    [
        (0, None, 42, ["Add.\n1+1=", "Add.\n2+3=", "Add.\n4+4="]),
        (0, 2, 42, ["Add.\n1+1=", "Add.\n2+3="]),
        (1, 2, 42, ["Add.\n4+4=8; 1+1=", "Add.\n4+4=8; 2+3="]),
        (
            2,
            None,
            7,
            [
                "Add.\n2+3=five; 1+1=2; 4+4=",
                "Add.\n1+1=2; 4+4=8; 2+3=",
                "Add.\n2+3=five; 4+4=8; 1+1=",
            ],
        ),
    ],
)
def test_prompts_of_texts(write, shots, limit, seed, texts):
    task = write(SUMS)
    assert [p.text for p in draw_prompts(task, shots, limit=limit, seed=seed)] == texts


def test_an_example_is_never_its_own_shot(write):
    """Nor is one that says the same in another way; one repeated to the letter is left out."""
    twice = [{"input": "1+1", "target": "2"}, {"input": "1+1", "target": ["2"]}]
    task = write(SUMS, examples=[*SUMS["examples"], *twice])
    assert task.duplicates == 1 and len(task.examples) == 4
    for seed in range(20):
        for prompt in draw_prompts(task, 2, seed=seed):
            question = prompt.example.query
            assert prompt.text.count(question) == 1 and prompt.text.endswith(question)
    with pytest.raises(TaskError, match="sums has 4 examples, too few for 3 shots"):
        draw_prompts(task, 3)


# --- Files ----------------------------------------------------------------------------------


def test_tasks_are_found_by_name_and_pattern(tmp_path):
    empty = {key: value for key, value in SUMS.items() if key != "examples"}
    for path, task in {
        "sums": empty, "sums/small": SUMS, "sums/large": SUMS, "colours": COLOURS, "notes": None,
    }.items():  # fmt: skip
        (tmp_path / path).mkdir(parents=True)
        if task:
            (tmp_path / path / "task.json").write_text(json.dumps(task))
    found = find_tasks(tmp_path)
    assert list(found) == ["colours", "sums:large", "sums:small"]
    assert list(find_tasks(tmp_path / "colours")) == ["colours"]
    assert select_tasks(found, ["sums"]) == ["sums:large", "sums:small"]
    assert select_tasks(found, ["*:small", "c*"]) == ["colours", "sums:small"]
    with pytest.raises(TaskError, match=r"colors: no such task; did you mean colours"):
        select_tasks(found, ["colors"])
    with pytest.raises(TaskError, match="has no task.json"):
        find_tasks(tmp_path / "notes")


def test_bad_examples_are_counted_and_named(write, tmp_path):
    bad = [
        {"input": "No choices?", "target_scores": {}},
        {"input": "An empty one?", "target_scores": {"": 0, "a": 1}},
        {"input": "None is right?", "target_scores": {"a": 0, "b": 0}},
        {"input": "Nothing to choose by?", "target": "a"},
        {"target_scores": {"a": 1}},
    ]
    examples = [COLOURS["examples"][0], *bad]
    task = write(COLOURS, examples=examples)
    file = tmp_path / "colours" / "task.json"
    assert len(task.examples) == 1
    assert [str(row) for row in task.bad_examples] == [
        f"{file}:2 has no choices",
        f"{file}:3 has an empty choice, which no model can find unlikely",
        f"{file}:4 has no choice that is right",
        f"{file}:5 has no target_scores to choose by",
        f"{file}:6 has no input text",
    ]
    with pytest.raises(TaskError, match="5 bad examples, more than 4: .*colours/task.json:2"):
        write(COLOURS, examples=examples, max_bad_examples=4)
    silent = write(SUMS, examples=[*SUMS["examples"], {"input": "0", "target": ""}])
    assert "which silence would match" in silent.bad_examples[0].reason


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"examples": [', "is not valid JSON: Expecting value"),
        ("[]", "must hold a JSON object, not a list"),
        ('{"metrics": []}', "has neither examples nor subtasks"),
        ('{"examples": [], "metrics": [], "output_regex": "("}', "'(' cannot be read"),
        ('{"examples": [], "metrics": [], "stop_string": 3}', "stop_string is 3, of the wrong"),
    ],
)
def test_a_file_that_is_no_task_is_named(tmp_path, text, message):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(TaskError) as caught:
        read_task("mine", tmp_path / "task.json")
    assert str(tmp_path / "task.json") in str(caught.value) and message in str(caught.value)


# --- The package ----------------------------------------------------------------------------


@pytest.mark.skipif(not is_packaged_here(), reason="BIG-bench (358 MB) has not been fetched")
def test_the_package():
    files = find_tasks(packaged_folder())
    assert len(files) == 1001 and len({name.partition(":")[0] for name in files}) == 167
    task = read_task("emoji_movie", files["emoji_movie"])
    assert len(task.examples) == 100 and task.unknown_metrics == ("rouge", "bleu")
    (prompt,) = draw_prompts(task, 0, limit=1)
    assert prompt.text.startswith("\nQ: What movie does this emoji describe? ")
    assert prompt.text.count("\n  choice: ") == 5 and prompt.text.endswith("\nA: ")
    arithmetic = select_tasks(files, ["arithmetic"])
    assert len(arithmetic) == 20
    assert read_task("a", files[arithmetic[0]]).format.output_regex == r"[-+]?\d+"
