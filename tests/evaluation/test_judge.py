"""The judge, what it learns from, and distinct-n."""

import json

import pytest

from llm.data.config import SourceConfig
from llm.evaluation.judge import Judge, distinct_n, labelled_texts


@pytest.mark.parametrize("by_characters", [False, True])
def test_the_judge_tells_labels_apart_and_is_deterministic(by_characters):
    good = [f"a fine and lovely film {i}" for i in range(20)]
    bad = [f"a dull and awful film {i}" for i in range(20)]
    labels = ["fresh"] * 20 + ["rotten"] * 20
    judge, again = (Judge(good + bad, labels, by_characters=by_characters) for _ in range(2))
    unseen = ["lovely, so fine", "awful and so dull"]
    assert judge(unseen) == again(unseen) == ["fresh", "rotten"]
    assert judge.agreement(unseen, ["fresh", "fresh"]) == 0.5


def write(tmp_path, rows):
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(paths=(str(path),), validation_fraction=0.0)


def test_rows_without_text_or_label_are_named(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b"}, {"label": 0}, {"text": "c", "label": "x"}]
    found = labelled_texts(write(tmp_path, rows), "label")
    assert (found.texts, found.labels) == (["a", "c"], ["1", "x"])
    assert [(row.row, row.reason) for row in found.bad_rows] == [
        (2, "no field 'label'"),
        (3, "no field 'text'"),
    ]
    rows = [{"text": "a", "label": None}]
    with pytest.raises(ValueError, match="no row with a text and 'label'; 1 bad rows: .*jsonl:1 "):
        labelled_texts(write(tmp_path, rows), "label")


def test_conversations_are_judged_by_their_last_answer(tmp_path):
    config = write(tmp_path, [{"prompt": "ask", "response": "say", "kind": "k"}])
    config = SourceConfig(paths=config.paths, format="prompt_response", validation_fraction=0.0)
    assert labelled_texts(config, "kind")[:2] == (["say"], ["k"])


def test_distinct_n_is_the_share_of_different_n_grams():
    assert distinct_n([[1, 2, 1, 2, 1]], 2) == 0.5  # 12 21 12 21
    assert distinct_n([[1, 2], [2, 1], [1, 2]], 2) == pytest.approx(2 / 3)  # none across responses
    assert distinct_n([[1, 2, 3]], 1) == 1.0 and distinct_n([[1], []], 2) == 0.0
