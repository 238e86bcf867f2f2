"""reasoning-gym's checkers as a reward: the real package where it is, and one of its shape."""

import json
import re
import sys
import types

import pytest

from llm.data.config import SourceConfig
from llm.data.tokenizer_training import byte_tokenizer
from llm.rl.config import RewardConfig
from llm.rl.prompts import load_prompts
from llm.rl.rewards import RewardError, make_verifier


def check_sum(answer, entry):
    """As chain_sum's: a text that holds the answer gets its share."""
    right = entry["answer"]
    if answer == right:
        return 1.0
    return len(right) / len(answer) if answer and right in answer else 0.0


def check_factors(answer, entry):
    """As prime_factorization's: a ValueError for what is no product of numbers."""
    return float(sorted(int(x) for x in answer.split("×")) == entry["metadata"]["factors"])


ENTRIES = {
    "chain_sum": {
        "question": "State the final answer to the following arithmetic problem: 4 + 3 =",
        "answer": "7",
        "metadata": {"source_dataset": "chain_sum", "expression": "4 + 3"},
    },
    "prime_factorization": {
        "question": "Find the prime factorization of 12.",
        "answer": "2 × 2 × 3",
        "metadata": {"source_dataset": "prime_factorization", "factors": [2, 2, 3]},
    },
}
CHECKS = {"chain_sum": check_sum, "prime_factorization": check_factors}


def stand_in():
    """Modules with what reasoning-gym 0.1.25 has of it."""
    package, utils = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.utils")

    def get_score_answer_fn(name):
        if name not in CHECKS:
            raise ValueError(f"Dataset '{name}' not registered")
        return CHECKS[name]

    def extract_answer(completion, tag_name="answer", strip=True):
        found = re.findall(f"<{tag_name}>\\s?(.*?)\\s?</{tag_name}>", completion, re.DOTALL)
        return found[-1].strip() if found else None

    package.get_score_answer_fn, utils.extract_answer = get_score_answer_fn, extract_answer
    package.create_dataset = lambda name, seed, size: [ENTRIES[name]] * size
    return {"reasoning_gym": package, "reasoning_gym.utils": utils}


@pytest.fixture(params=["real", "stand_in"])
def gym(request, monkeypatch):
    if request.param == "real":
        return pytest.importorskip("reasoning_gym")
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["reasoning_gym"]


def prompts_of(tmp_path, rows):
    """Entries as a run reads them: from a file, by the fields that it keeps."""
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SourceConfig(
        paths=(str(path),),
        text_field="question",
        kept_fields=("answer", "metadata"),
        validation_fraction=0.0,
    )
    return load_prompts(config, byte_tokenizer(), max_tokens=999, max_bad_rows=0).prompts


def reward_of(name):
    return make_verifier(RewardConfig(kind="reasoning_gym", path=name))


def test_answers_are_checked_in_and_without_tags(gym, tmp_path):
    entry = gym.create_dataset("chain_sum", seed=1, size=1)[0]
    prompts, right = prompts_of(tmp_path, [entry]), entry["answer"]
    said = [
        right,
        f" {right}\n",
        f"Let me see: <answer>0x</answer>, no: <answer> {right} </answer>.",
        "<answer>wrong</answer> " + right,
        "",
    ]
    assert reward_of("chain_sum")(prompts * 5, said) == [1.0, 1.0, 1.0, 0.0, 0.0]
    (part,) = reward_of("chain_sum")(prompts, [f"It is {right}"])
    assert 0 < part < 1


def test_what_a_checker_fails_on_is_wrong(gym, tmp_path):
    entry = gym.create_dataset("prime_factorization", seed=1, size=1)[0]
    prompts = prompts_of(tmp_path, [entry])
    reward = reward_of("prime_factorization")
    assert reward(prompts * 2, ["no idea", entry["answer"]]) == [0.0, 1.0]


def test_rows_that_are_no_entries_are_named(gym, tmp_path):
    entry = gym.create_dataset("chain_sum", seed=1, size=1)[0]
    with pytest.raises(RewardError, match="tasks.jsonl:2 has no field 'metadata'"):
        bare = {"question": "1 + 1 =", "answer": "2"}
        reward_of("chain_sum")(prompts_of(tmp_path, [entry, bare])[1:], ["2"])
    with pytest.raises(RewardError, match="jsonl:1: .*'prime_factorization' gives .* own answer"):
        other = entry | {"answer": "no product"}
        reward_of("prime_factorization")(prompts_of(tmp_path, [other]), ["7"])
    with pytest.raises(ValueError, match="path 'chain_summ' names no set of reasoning-gym: Data"):
        reward_of("chain_summ")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        reward_of("chain_sum")
