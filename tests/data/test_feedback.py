"""Feedback rows become records and rows again: nothing is lost, and bad rows say what is wrong."""

import json
import typing

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data.config import FeedbackKind
from llm.data.feedback import Kind, from_row, join, to_row
from llm.data.feedback_rows import READERS, FeedbackError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant:"
HH_PROMPT = (user("hi"), assistant("hello"), user("who?"))
ANNOTATIONS = {"honesty": {"Rating": "4"}, "truthfulness": {"Rating": "N/A"}, "help": {"Rating": 1}}
ONE_TURN_FOR_TFDS = {"role": np.array([b"assistant"]), "content": np.array([b"good"])}
Q = (user("q"),)

# Rows as public data sets have them, and what they say: prompt, responses, levels, details.
SHAPES = {
    "hh-rlhf": (
        {"chosen": HH + " me", "rejected": HH + " you"},
        ("comparison", HH_PROMPT, ("me", "you"), (1, 0), {}),
    ),
    "hh-rlhf with its prompt": (
        {"prompt": HH, "chosen": " me", "rejected": " you"},
        ("comparison", HH_PROMPT, (" me", " you"), (1, 0), {}),
    ),
    "plain comparison": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 2, "source": "x"},
        ("comparison", Q, ("good", "bad"), (1, 0), {"source": "x"}),
    ),
    "TRL, conversational": (
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ("comparison", Q, ("good", "bad"), (1, 0), {}),
    ),
    "TFDS": (
        {"prompt": b"q", "chosen": ONE_TURN_FOR_TFDS, "rejected": b"bad"},
        ("comparison", Q, ("good", "bad"), (1, 0), {}),
    ),
    "UltraFeedback, binarized": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
            "score_chosen": 8.5,
            "score_rejected": 8.5,
        },
        ("comparison", Q, ("good", "bad"), (1, 0), {"score_chosen": 8.5, "score_rejected": 8.5}),
    ),
    "ranking": (
        {"prompt": "q", "responses": ["c", "a", "b"], "ranking": [1, 2, 0]},
        ("ranking", Q, ("c", "a", "b"), (-3, -1, -2), {}),
    ),
    "ranks": (
        {"prompt": "q", "responses": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 3]},
        ("ranking", Q, ("a", "b", "c", "d"), (-1, -2, -2, -3), {}),
    ),
    "UltraFeedback": (
        {"instruction": "q", "models": ["m"], "completions": [
            {"response": "a", "overall_score": 7.5}, {"response": "b", "annotations": ANNOTATIONS}
        ]},
        ("rating", Q, ("a", "b"), (7.5, 2.5), {"models": ["m"], "completions": [
            {"response": "a", "overall_score": 7.5}, {"response": "b", "annotations": ANNOTATIONS}
        ]}),
    ),
    "flat rating": (
        {"prompt": "q", "response": "a", "rating": 4, "rater": "x", "note": None},
        ("rating", Q, ("a",), (4,), {"rater": "x"}),
    ),
    "KTO": (
        {"prompt": "q", "completion": "a", "label": False},
        ("thumbs", Q, ("a",), (0,), {}),
    ),
    "KTO, conversational": (
        {"prompt": [user("q")], "completion": [assistant("a")], "label": True},
        ("thumbs", Q, ("a",), (1,), {}),
    ),
    "KTO from TFDS": (
        {"prompt": b"q", "response": b"a", "label": np.bool_(True)},
        ("thumbs", Q, ("a",), (1,), {}),
    ),
    "correction": (
        {"prompt": "q", "response": "teh", "edit": "the", "editor": 3},
        ("correction", Q, ("the", "teh"), (1, 0), {"editor": 3}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_public_rows_are_understood(name):
    row, expected = SHAPES[name]
    found = from_row(row, "auto", "file:3")
    told = (found.kind, found.prompt, found.responses, found.levels, found.details)
    assert told == expected and found.id == "file:3"
    assert found.margin == row.get("margin", 0)
    # The canonical row is JSON, says the same, and is a fixed point.
    canonical = json.loads(json.dumps(to_row(found)))
    assert from_row(canonical, found.kind, "file:3") == found
    assert to_row(from_row(canonical, found.kind)) == canonical


def test_canonical_rows_are_these():
    rows = {name: to_row(from_row(row, "auto")) for name, (row, _) in SHAPES.items()}
    q = [user("q")]
    assert rows["hh-rlhf"] == {"prompt": list(HH_PROMPT), "chosen": "me", "rejected": "you"}
    assert rows["plain comparison"] == {
        "prompt": q, "chosen": "good", "rejected": "bad", "margin": 2.0, "source": "x"
    }  # fmt: skip
    assert rows["ranking"] == {"prompt": q, "responses": ["c", "a", "b"], "ranks": [3, 1, 2]}
    assert rows["flat rating"] == {"prompt": q, "responses": ["a"], "ratings": [4], "rater": "x"}
    assert rows["KTO"] == {"prompt": q, "responses": ["a"], "labels": [False]}
    assert rows["correction"] == {"prompt": q, "edited": "the", "response": "teh", "editor": 3}


def test_every_kind_of_the_config_is_read():
    assert set(READERS) == set(typing.get_args(Kind))
    assert set(READERS) | {"auto"} == set(typing.get_args(FeedbackKind))


# --- Round trips ----------------------------------------------------------------------------

SAID = st.text(min_size=1, max_size=8).filter(str.strip)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PROMPTS = st.builds(
    lambda turns, last: [*turns, last],
    st.lists(st.builds(lambda r, c: {"role": r, "content": c},
                       st.sampled_from(["system", "user", "assistant"]), SAID), max_size=3),
    st.builds(user, SAID),
)  # fmt: skip
# Fields that nothing reads; null is the same as none.
EXTRAS = st.dictionaries(
    st.sampled_from(["source", "turn", "messages", "note"]),
    st.recursive(
        st.booleans() | st.integers() | SAID, lambda x: st.lists(x) | st.dictionaries(SAID, x)
    ),
)


@st.composite
def canonical_rows(draw, kind):
    """A row of a kind in its canonical form, written down without the code that is tested."""
    row = {"prompt": draw(PROMPTS), **draw(EXTRAS)}
    if kind in ("comparison", "correction"):
        better, worse = draw(st.lists(SAID, min_size=2, max_size=2, unique=True))
        names = {"comparison": ("chosen", "rejected"), "correction": ("edited", "response")}[kind]
        row |= dict(zip(names, (better, worse), strict=True))
        if kind == "comparison" and draw(st.booleans()):
            row["margin"] = draw(NUMBERS.filter(bool))
        return row
    values = {
        "ranking": ("ranks", st.integers(1, 5).map(float)),
        "rating": ("ratings", NUMBERS),
        "thumbs": ("labels", st.booleans() | st.floats(0, 1, exclude_min=True, exclude_max=True)),
    }
    name, value = values[kind]
    row["responses"] = draw(st.lists(SAID, min_size=1, max_size=5, unique=True))
    size = len(row["responses"])
    row[name] = draw(st.lists(value, min_size=size, max_size=size))
    return row


@pytest.mark.parametrize("kind", sorted(READERS))
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_rows_and_records_tell_the_same(kind, data):
    row = data.draw(canonical_rows(kind))
    record = from_row(row, kind)
    assert to_row(record) == row
    assert json.dumps(to_row(record), sort_keys=True) == json.dumps(row, sort_keys=True)
    assert from_row(to_row(record), kind) == record
    assert from_row(row, "auto") == record


@hypothesis.given(
    turns=st.lists(
        st.text(max_size=12).map(str.strip).filter(lambda s: s and "\n\n" not in s),
        min_size=3, max_size=7,
    ).filter(lambda turns: len(turns) % 2 == 1 and turns[-1] != turns[-2])
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None)
def test_dialogues_are_cut_into_their_turns(turns):
    *asked, good, bad = turns
    speakers = ["Human", "Assistant"] * len(turns)
    text = "".join(f"\n\n{who}: {said}" for who, said in zip(speakers, asked, strict=False))
    record = from_row(
        {"chosen": f"{text}\n\nAssistant: {good}", "rejected": f"{text}\n\nAssistant: {bad}"},
        "auto",
    )
    assert [turn["content"] for turn in record.prompt] == asked
    assert [turn["role"] for turn in record.prompt[:2]] == ["user", "assistant"][: len(asked)]
    assert record.responses == (good, bad)


@hypothesis.given(order=st.integers(1, 6).flatmap(lambda n: st.permutations(range(n))))
@hypothesis.settings(deadline=None)
def test_each_pair_of_a_ranking_keeps_its_order(order):
    responses = [f"response {i}" for i in range(len(order))]
    record = from_row({"prompt": "q", "responses": responses, "ranking": order}, "auto")
    by_level = sorted(zip(record.levels, record.responses, strict=True), reverse=True)
    assert [response for _, response in by_level] == [responses[i] for i in order]
    assert record.num_pairs == len(order) * (len(order) - 1) // 2


def test_the_group_is_the_prompt_and_nothing_else():
    one = from_row({"prompt": "q", "response": "a", "rating": 1}, "auto")
    same = from_row({"prompt": [user("q")], "chosen": "x", "rejected": "y"}, "auto")
    other = from_row({"prompt": "q ", "response": "a", "rating": 1}, "auto")
    assert one.group == same.group != other.group


# --- Joining --------------------------------------------------------------------------------


def test_joined_votes_are_shares_and_keep_their_rows():
    rows = [("a", True), ("b", False), ("a", False), ("a", True), ("b", False)]
    records = [
        from_row({"prompt": "q", "response": r, "label": v, "by": i}, "auto", f"f:{i}")
        for i, (r, v) in enumerate(rows)
    ]
    joined = join(records)
    assert joined.responses == ("a", "b") and joined.levels == (2 / 3, 0)
    assert [row["id"] for row in joined.details["rows"]] == ["f:0", "f:1", "f:2", "f:3", "f:4"]
    assert [row["details"] for row in joined.details["rows"]] == [{"by": i} for i in range(5)]
    assert from_row(to_row(joined), "thumbs", "f:0") == joined
    assert join(records[:1]) == records[0]


def test_equal_ratings_stay_a_tie_when_joined():
    # 0.1 + 0.1 + 0.1 is not 0.3 in binary: a plain mean would make a pair of this tie.
    records = [from_row({"prompt": "q", "response": r, "rating": 0.1}, "auto") for r in "aaab"]
    assert join(records).levels == (0.1, 0.1) and join(records).num_pairs == 0


# --- Bad rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "x"}, "the fields text are none of the kinds"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "two responses are identical"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "response 2 is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "conversation is empty"),
        ({"chosen": "a", "rejected": "b"}, "no 'Human:' and 'Assistant:', and no prompt"),
        ({"chosen": "Be.\n\nHuman: q\n\nAssistant: a", "rejected": HH}, "begins with 'Be.'"),
        ({"chosen": HH + " a", "rejected": HH.replace("who", "what") + " b"}, "different prompts"),
        ({"chosen": HH + " a", "rejected": "\n\nHuman: hi"}, "does not end with an answer"),
        (
            {"prompt": "other", "chosen": [user("q"), assistant("a")],
             "rejected": [user("q"), assistant("b")]},
            "the prompt is not the one that chosen and rejected answer",
        ),
        ({"prompt": [assistant("x")], "response": "a", "rating": 1}, "nothing is asked"),
        ({"prompt": [{"role": "boss", "content": "x"}], "response": "a", "rating": 1}, "'boss'"),
        (
            {"prompt": [{"role": ["user"], "content": "x"}], "response": "a", "rating": 1},
            r"turn 1 has the role \['user'\], not",
        ),
        ({"prompt": "q", "response": "a", "rating": float("nan")}, "not all finite"),
        ({"prompt": "q", "response": "a", "rating": "good"}, "'good' is not a number"),
        ({"prompt": "q", "response": "a", "rating": 10**400}, "is not a number"),
        ({"prompt": "q", "response": 3, "rating": 1}, "field 'response' is int, not text"),
        ({"prompt": "q", "response": [user("a")], "rating": 1}, "not one message of the assistant"),
        ({"prompt": "q", "rating": 1}, "no field 'response'"),
        ({"response": "a", "rating": 1}, "no field 'prompt'"),
        ({"prompt": b"\xff", "response": "a", "rating": 1}, "invalid UTF-8, byte 0"),
        ({"prompt": "q", "response": "\ud800", "rating": 1}, "half of a surrogate pair"),
        ({"prompt": "q", "completions": [{"response": "a"}]}, "neither overall_score nor annot"),
        ({"prompt": "q", "completions": ["a"]}, "'completions' is not a list of objects"),
        ({"prompt": "q", "responses": [], "ratings": []}, "there is no response"),
        ({"prompt": "q", "responses": ["a", "b"], "ratings": [1]}, "2 responses and 1 ratings"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": 3}, "'ranks' is int, not a list"),
        (
            {"prompt": "q", "responses": ["a", "b"], "ranking": [1, 2]},
            r"ranking \[1, 2\] is no order of the 2 responses, counted from 0",
        ),
        ({"prompt": "q", "response": "a", "label": "yes"}, "not true or false"),
        ({"prompt": "q", "response": "a", "label": -1}, "not true or false"),
        ({"prompt": "q", "edited": "a"}, "no field 'response'"),
        (
            {"prompt": "q", "completion": "a", "label": True, "labels": [True]},
            "field 'labels' says what prompt, completion, label say already",
        ),
    ],
)  # fmt: skip
def test_bad_rows_say_what_is_wrong(row, reason):
    with pytest.raises(FeedbackError, match=reason):
        from_row(row, "auto")


def test_fields_beside_those_that_are_read_are_details():
    row = {"prompt": "q", "instruction": "r", "responses": ["a"], "labels": [True], "label": False}
    assert from_row(row, "auto").details == {"instruction": "r", "label": False}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "response", "Rating", "annotations", "from"]), inner
        )
    ),
    max_leaves=6,
)
NAMES = ["prompt", "instruction", "chosen", "rejected", "margin", "responses", "response", "ranks",
         "ranking", "ratings", "rating", "completions", "completion", "labels", "label", "edited",
         "edit", "correction", "other"]  # fmt: skip


@hypothesis.given(
    row=st.dictionaries(st.sampled_from(NAMES), JSON | PROMPTS | st.just("q"), max_size=6),
    kind=st.sampled_from(["auto", *READERS]),
)
@hypothesis.settings(max_examples=500, deadline=None)
def test_whatever_a_row_holds_it_is_read_or_reported(row, kind):
    try:
        record = from_row(row, kind)
    except FeedbackError:
        return
    assert from_row(to_row(record), record.kind) == record
