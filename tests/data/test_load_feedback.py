"""Feedback from sources: prompts on one side of a split, joined, and bad rows counted."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llm.data.config import ComparisonsConfig, SourceConfig
from llm.data.feedback_source import load_feedback
from llm.data.rows import BadRow, SourceError, tell_rows
from llm.data.shard_writer import BadRowsError


def config_of(tmp_path, rows, *, source=None, **fields):
    path = tmp_path / "feedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"validation_fraction": 0.0, "paths": (str(path),), **(source or {})}
    return ComparisonsConfig(source=SourceConfig(format="feedback", **source), **fields)


def comparison(prompt, chosen="good", rejected="bad", **fields):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields}


def thumb(prompt, response, label):
    return {"prompt": prompt, "completion": response, "label": label}


def contents(found):
    return [tuple(message["content"] for message in record.prompt) for record in found.records]


def test_no_prompt_is_on_both_sides_of_a_split(tmp_path):
    rows = [comparison(f"question {i % 80}", f"better {i}") for i in range(240)]
    rows += [thumb(f"question {i % 80}", f"answer {i}", i < 80) for i in range(160)]
    config = config_of(tmp_path, rows, source={"validation_fraction": 0.3})
    train, held_out = load_feedback(config), load_feedback(config, "validation")
    sides = set(contents(train)), set(contents(held_out))
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 80
    # 80 prompts at 0.3: within four standard deviations (4.1) of 24.
    assert 8 <= len(sides[1]) <= 40
    # A prompt's three comparisons, and its two thumbs in one record.
    assert len(train.records) == 4 * len(sides[0]) and len(held_out.records) == 4 * len(sides[1])


def test_the_side_of_a_prompt_stays_when_rows_are_added(tmp_path):
    rows = [comparison(f"question {i}") for i in range(60)]
    fraction = {"validation_fraction": 0.5}
    few = load_feedback(config_of(tmp_path, rows[:40], source=fraction), "validation")
    more = load_feedback(config_of(tmp_path, rows[::-1], source=fraction), "validation")
    assert set(contents(few)) == set(contents(more)) & {(f"question {i}",) for i in range(40)}


def test_rows_of_one_prompt_are_put_together_and_repeats_dropped(tmp_path):
    rows = [
        comparison("q"),
        comparison("q", source="again"),
        comparison("q", "bad", "good"),
        thumb("q", "a", True),
        thumb("r", "c", True),
        thumb("q", "b", False),
        {"prompt": "q", "response": "a", "rating": 3},
        {"prompt": "q", "response": "b", "rating": 5},
        {"prompt": "s", "responses": ["a", "b"], "ranks": [1, 1]},
    ]
    config = config_of(tmp_path, rows)
    found = load_feedback(config)
    told = [(r.kind, r.responses, r.levels, r.id.split(":")[-1]) for r in found.records]
    assert told == [
        ("comparison", ("good", "bad"), (1, 0), "1"),
        ("comparison", ("bad", "good"), (1, 0), "3"),
        ("thumbs", ("a", "b"), (1, 0), "4"),
        ("rating", ("a", "b"), (3, 5), "7"),
    ]
    assert (found.num_repeated, found.num_without_pairs, found.bad_rows) == (1, 2, ())
    everything = load_feedback(config, pairs_only=False)
    assert everything.num_without_pairs == 2
    rest = [r for r in everything.records if r not in found.records]
    assert [(r.kind, r.responses, r.levels) for r in rest] == [
        ("ranking", ("a", "b"), (-1, -1)),
        ("thumbs", ("c",), (1,)),
    ]


def test_bad_rows_are_counted_up_to_a_limit(tmp_path):
    rows = [comparison("q"), comparison("q", "same", "same"), comparison("q", "", "x"), ["row"]]
    found = load_feedback(config_of(tmp_path, rows, max_bad_rows=3))
    assert len(found.records) == 1
    assert [(bad.row, bad.reason) for bad in found.bad_rows] == [
        (2, "two responses are identical, and one is said to be better"),
        (3, "response 1 is empty"),
        (4, "a JSON list, not an object"),
    ]
    with pytest.raises(BadRowsError, match=r"comparisons.max_bad_rows=2 .*feedback.jsonl:2 two re"):
        load_feedback(config_of(tmp_path, rows, max_bad_rows=2))
    with pytest.raises(ValueError, match="of 0 records none .* 1 rows are bad"):
        load_feedback(config_of(tmp_path, rows[1:2]))


def test_fields_can_be_renamed(tmp_path):
    # A field whose name is taken gives way; two can change places.
    row = {"question": "q", "prompt": "template", "chosen": "worse", "rejected": "better"}
    names = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    (record,) = load_feedback(config_of(tmp_path, [row], field_names=names)).records
    assert record.prompt[0]["content"] == "q" and record.responses == ("better", "worse")
    assert record.details == {}
    with pytest.raises(SourceError, match="'promt', which is no field .*did you mean prompt"):
        load_feedback(config_of(tmp_path, [row], field_names={"promt": "question"}))
    with pytest.raises(SourceError, match="no field 'asked'; it has question, prompt"):
        load_feedback(config_of(tmp_path, [row], field_names={"prompt": "asked"}))


def test_the_source_may_add_a_system_message_but_not_groups(tmp_path):
    has_one = comparison([{"role": "system", "content": "Mine."}, {"role": "user", "content": "q"}])
    config = config_of(tmp_path, [comparison("q"), has_one], source={"system_message": "Be kind."})
    assert contents(load_feedback(config)) == [("Be kind.", "q"), ("Mine.", "q")]
    source = {"group_field": "film", "validation_fraction": 0.5}
    rows = [comparison("q", film="x")]
    with pytest.raises(SourceError, match="group_field is 'film', but feedback is held out by pro"):
        load_feedback(config_of(tmp_path, rows, source=source))


def test_parquet_gives_the_same_records_as_json(tmp_path):
    rows = [
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 2.5},
                                             {"response": "b", "overall_score": 1.0}], "by": "x"},
        {"instruction": "ü", "completions": [{"response": "c", "overall_score": 2.5},
                                             {"response": "d", "overall_score": 3.0}], "by": "y"},
    ]  # fmt: skip
    path = tmp_path / "feedback.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    kept = {"kept_fields": ("by",)}
    in_json = load_feedback(config_of(tmp_path, rows, source=kept))
    in_parquet = load_feedback(config_of(tmp_path, [], source=kept | {"paths": (str(path),)}))
    assert [(r.prompt, r.responses, r.levels, r.details) for r in in_json.records] == [
        (r.prompt, r.responses, r.levels, r.details) for r in in_parquet.records
    ]
    assert [record.details["by"] for record in in_parquet.records] == ["x", "y"]


def test_left_out_rows_are_counted_and_the_first_named():
    rows = [BadRow("a.jsonl", row, "empty text") for row in (2, 5, 7, 9)]
    assert tell_rows(rows, "bad rows left out") == (
        "4 bad rows left out: a.jsonl:2 empty text; a.jsonl:5 empty text; a.jsonl:7 empty text; …"
    )
    assert tell_rows(["a.jsonl:2"], "too long") == "1 too long: a.jsonl:2"
    assert tell_rows([], "too long") == "0 too long"
