"""Conversations as training data: rows to messages, masks in batches, whole prompts in splits."""

import json

import pytest

from llm.data.config import DataConfig, SourceConfig
from llm.data.conversations import ConversationError, read_conversation
from llm.data.loader import make_batches
from llm.data.prepare import prepare
from llm.data.sources import open_source
from llm.data.tokenizer_training import byte_tokenizer

CHATS = SourceConfig(format="messages")
PAIRS = SourceConfig(format="prompt_response")


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_rows_of_every_shape_become_the_same_messages():
    expected = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    shapes = [
        (CHATS, {"messages": turns("a", "b")}),
        (CHATS, {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        (CHATS, {"messages": {"role": [b"user", b"assistant"], "content": [b"a", b"b"]}}),  # TFDS
        (PAIRS, {"prompt": "a", "response": "b"}),
        (PAIRS, {"prompt": b"a", "response": b"b"}),
    ]
    for config, row in shapes:
        assert read_conversation(row, config) == expected
    alpaca = SourceConfig(
        format="prompt_response",
        prompt_field="instruction",
        context_field="input",
        response_field="output",
        system_message="Be kind.",
    )
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert [m["content"] for m in read_conversation(row, alpaca)] == [
        "Be kind.",
        "Add.\n\n1 2",
        "3",
    ]
    assert read_conversation({**row, "input": ""}, alpaca)[1]["content"] == "Add."


@pytest.mark.parametrize(
    "config, row, reason",
    [
        (CHATS, {"text": "x"}, "no field 'messages'"),
        (CHATS, {"messages": []}, "is empty, not a list of turns"),
        (CHATS, {"messages": "hi"}, "of type str, not a list"),
        (CHATS, {"messages": ["hi"]}, "turn 1 is of type str"),
        (CHATS, {"messages": turns("a", " ")}, "turn 2, of the assistant, is empty"),
        (CHATS, {"messages": turns("a")}, "no assistant turn"),
        (CHATS, {"messages": [{"role": "boss", "content": "a"}]}, "role 'boss', not system, user"),
        (CHATS, {"messages": [{"role": "user", "content": 3}]}, "of type int for content"),
        (PAIRS, {"prompt": "a", "response": ""}, "turn 2, of the assistant, is empty"),
        (PAIRS, {"prompt": "a"}, "no field 'response'"),
        (PAIRS, {"prompt": b"\xff", "response": "b"}, "invalid UTF-8"),
    ],
)
def test_bad_rows_say_what_is_wrong(config, row, reason):
    with pytest.raises(ConversationError, match=reason):
        read_conversation(row, config)


def config_of(tmp_path, rows, **source):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(paths=(str(path),), **{"format": "messages", **source})
    return DataConfig(sources={"chats": source}, cache_dir=str(tmp_path), length_tokens=48)


def test_only_what_the_assistant_says_is_learnt(tmp_path):
    chats = [turns("hello", "HI"), turns("who?", "ME", "sure?", "YES"), turns("long", "L" * 60)]
    rows = [{"messages": chat} for chat in chats]
    rows.insert(1, {"messages": "broken"})
    config = config_of(tmp_path, rows, validation_fraction=0.0)
    tokenizer = byte_tokenizer()
    prepared = prepare(config, tokenizer, tmp_path / "prepared")
    (bad,) = prepared.report["bad_rows"]["chats"]["rows"]
    assert bad[1:] == [2, "the conversation is of type str, not a list of turns"]
    split = prepared.train["chats"]
    assert sorted(split.num_bytes) == [2, 5, 60] and sorted(split.num_targets) == [3, 7, 61]
    batches = make_batches(prepared.train, None, 48, 4, seed=0, num_epochs=1)
    learnt, pieces = [], 0
    for batch in batches:
        for row in range(4):
            pieces += batch["segment_ids"][row].max()
            targets = batch["targets"][row][batch["loss_weights"][row] > 0]
            learnt += tokenizer.decode(targets).split("<|eos|>")
    # The long conversation ends with its row, and no piece without its prompt is made of it.
    assert pieces == 3
    assert sorted(filter(None, learnt)) == ["HI", "L" * 41, "ME", "YES"]


def test_a_prompt_is_on_one_side_of_the_split(tmp_path):
    rows = [{"messages": turns(f"question {i % 40}", f"answer {i}")} for i in range(200)]
    config = config_of(tmp_path, rows, validation_fraction=0.3)
    sides = []
    for split in ("train", "validation"):
        source = open_source(config.sources["chats"], split)
        documents = [d for shard in source.shards() for d in source.read(shard)]
        sides.append({d.messages[0]["content"] for d in documents})
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert min(map(len, sides)) > 3


def test_conversations_are_not_packed_online():
    with pytest.raises(ValueError, match="sources.chats holds conversations: packing must be"):
        DataConfig(sources={"chats": CHATS}, packing="online")


def test_the_format_is_part_of_what_was_prepared(tmp_path):
    row = {"prompt": "a", "response": "b", "text": "c"}
    texts = config_of(tmp_path, [row] * 3, format="text", validation_fraction=0.0)
    pairs = config_of(tmp_path, [row] * 3, format="prompt_response", validation_fraction=0.0)
    prints = {open_source(c.sources["chats"]).fingerprint() for c in (texts, pairs)}
    assert len(prints) == 2
