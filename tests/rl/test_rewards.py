"""Prompts and rewards: what they give, and what they say of bad input."""

import json

import numpy as np
import pytest

from llm.data.config import SourceConfig
from llm.data.tokenizer_training import byte_tokenizer
from llm.rl.config import RewardConfig
from llm.rl.prompts import Prompt, PromptBatches, load_prompts
from llm.rl.rewards import RewardError, make_verifier, score

TOKENIZER = byte_tokenizer()


def prompts_with(**fields):
    return [Prompt(({"role": "user", "content": "?"},), (1,), fields, "tasks.jsonl:7")]


@pytest.mark.parametrize(
    "response, expected",
    [("It is 12.", 1.0), ("12 of 13", 0.0), ("24/2", 1.0), ("1,2", 1.0), ("12.0!", 1.0),
     ("-12", 0.0), ("none", 0.0), ("", 0.0), ("3/0", 0.0)],
)  # fmt: skip
def test_arithmetic_reads_the_last_number(response, expected):
    reward = make_verifier(RewardConfig(kind="arithmetic"))
    assert reward(prompts_with(answer="12"), [response]) == [expected]
    assert reward(prompts_with(answer=12), [response]) == [expected]


def test_patterns_match_the_whole_response():
    reward = make_verifier(RewardConfig(kind="pattern", path=r"<think>.*</think>\d+"))
    assert reward(prompts_with() * 2, ["<think>a\nb</think>12", "x<think></think>1"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="is no regular expression: .*unterminated"):
        make_verifier(RewardConfig(kind="pattern", path="(a"))


def test_python_functions_are_found_by_name():
    assert make_verifier(RewardConfig(kind="python", path="math:fsum"))([1.0, 2.0]) == 3.0
    for path in ("math:nothing", "no_such_module:f", "math"):
        with pytest.raises(ValueError, match="module:name, is not there"):
            make_verifier(RewardConfig(kind="python", path=path))


def test_rewards_are_summed_by_weight_and_kept_apart():
    rewards = {"a": (lambda p, r: [1.0, 2.0], 0.5), "b": (lambda p, r: np.array([3.0, 4.0]), -1.0)}
    total, by_name = score(rewards, prompts_with() * 2, ["x", "y"])
    assert total.tolist() == [-2.5, -3.0] and total.dtype == np.float32
    assert by_name["b"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda p, r: [1.0], r"'bad' returned shape \(1,\) for 2 responses"),
        (lambda p, r: 1.0, r"shape \(\) for 2 responses"),
        (lambda p, r: [0.0, float("nan")], "gave nan to the response 'y' to tasks.jsonl:7"),
        (lambda p, r: [float("inf"), 0.0], "gave inf to the response 'x'"),
    ],
)
def test_a_reward_that_is_no_finite_number_each_is_named(bad, message):
    with pytest.raises(RewardError, match=message):
        score({"bad": (bad, 1.0)}, prompts_with() * 2, ["x", "y"])


def test_a_row_without_its_answer_is_named():
    with pytest.raises(RewardError, match="tasks.jsonl:7 has no field 'answer'"):
        make_verifier(RewardConfig(kind="arithmetic"))(prompts_with(), ["1"])


def load(tmp_path, rows, max_tokens=40, **source):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SourceConfig(paths=(str(path),), validation_fraction=0.0, **source)
    return load_prompts(config, TOKENIZER, max_tokens=max_tokens, max_bad_rows=2)


def test_prompts_are_what_comes_before_the_answer(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = [{"role": role, "content": text} for role, text in turns]
    for rows, source, expected in (
        ([{"messages": chat}], dict(format="messages"), ["a", "b", "c"]),
        ([{"messages": chat[:3]}], dict(format="messages"), ["a", "b", "c"]),
        ([{"prompt": "a", "response": "b"}], dict(format="prompt_response"), ["a"]),
        ([{"text": "a"}], dict(system_message="S"), ["S", "a"]),
    ):
        (prompt,) = load(tmp_path, rows, **source).prompts
        assert [m["content"] for m in prompt.messages] == expected
        assert list(prompt.tokens) == TOKENIZER.encode_chat(prompt.messages, True)


def test_long_repeated_and_bad_prompts_are_counted(tmp_path):
    rows = [{"text": "a", "answer": 3}, {"text": "b" * 50}, {"text": "a"}, {"wrong": 1}]
    found = load(tmp_path, rows, kept_fields=("answer",))
    (prompt,) = found.prompts
    assert prompt.fields["answer"] == 3 and prompt.id.endswith("tasks.jsonl:1")
    assert [name.rpartition(":")[2] for name in found.too_long] == ["2"]
    assert [bad.row for bad in found.bad_rows] == [4]
    long, bad = found.left_out()
    assert long.startswith("1 prompts longer than 40 tokens left out: ")
    assert long.endswith("tasks.jsonl:2")
    assert "tasks.jsonl:4 " in bad and "text" in bad
    with pytest.raises(ValueError, match="no prompts are left of .*: 1 are longer than .*=40"):
        load(tmp_path, [{"text": "b" * 50}])


def test_prompts_are_dealt_once_an_epoch_from_any_place(tmp_path):
    prompts = load(tmp_path, [{"text": str(i)} for i in range(7)]).prompts
    batches = PromptBatches(prompts, 3, seed=1)
    dealt = [p.text for _ in range(14) for p in next(batches)]
    epochs = [dealt[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == sorted("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    batches.seek(6)
    assert [p.text for p in next(batches)] == dealt[6:9] and batches.cursor == 9
