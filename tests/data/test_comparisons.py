"""Feedback as tokens and as batches: answers masked, pairs in order, one cursor for all."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data.comparisons import ComparisonBatches, encode_feedback, spread
from llm.data.config import ComparisonsConfig
from llm.data.feedback import Feedback, from_row
from llm.data.tokenizer_training import byte_tokenizer, train_tokenizer

# --- To tokens ------------------------------------------------------------------------------

# As ChatML: turns end with a line break that no sampler writes.
LINES = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
# Says how many turns follow: a prompt alone is not the start of the conversation.
COUNTING = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["good and\n\n\nbad\n\n answers\n\n"] * 20, 300)


def record_of(*responses, levels=None, prompt="q", margin=0.0, identity="f:1"):
    levels = tuple(map(float, levels or range(len(responses), 0, -1)))
    messages = ({"role": "user", "content": prompt},)
    return Feedback("rating", messages, responses, levels, margin, id=identity)


def test_answers_are_told_from_their_prompt():
    tokenizer = byte_tokenizer()
    ((encoded,), cut) = encode_feedback([record_of("yes", "no")], tokenizer, 64)
    spelled = [tokenizer.decode(row) for row in encoded.rows]
    assert spelled == [f"<|bos|><|user|>q<|eos|><|assistant|>{a}<|eos|>" for a in ("yes", "no")]
    assert encoded.starts == (5, 5) and cut == []
    assert encoded.levels == (2, 1) and encoded.id == "f:1"


def test_a_single_answer_is_masked_as_in_conversations(trained):
    """`encode_chat_masked` finds what the assistant says by other means: the template's marks."""
    for tokenizer in (trained, byte_tokenizer(), trained.with_chat_template(LINES)):
        for answer in ("good", " and\n", "<|eos|> is spelled"):
            record = record_of(answer)
            ((encoded,), _) = encode_feedback([record], tokenizer, 64, pairs_only=False)
            messages = [*record.prompt, {"role": "assistant", "content": answer}]
            ids, mask = tokenizer.encode_chat_masked(messages)
            (row,), (start,) = encoded.rows, encoded.starts
            assert row[start:].tolist() == list(itertools.compress(ids, mask))
            assert row.tolist() == ids[: len(row)] and row[-1] == tokenizer.eos_id


def test_earlier_answers_belong_to_the_prompt():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = tuple({"role": role, "content": content} for role, content in turns)
    record = Feedback("comparison", prompt, ("good", "bad"), (1.0, 0.0))
    tokenizer = byte_tokenizer()
    ((encoded,), _) = encode_feedback([record], tokenizer, 64)
    answers = [r[s:] for r, s in zip(encoded.rows, encoded.starts, strict=True)]
    assert [tokenizer.decode(answer) for answer in answers] == ["good<|eos|>", "bad<|eos|>"]


def test_what_the_template_writes_behind_the_end_is_left_off(trained):
    tokenizer = trained.with_chat_template(LINES)
    ((encoded,), _) = encode_feedback([record_of("good", "bad")], tokenizer, 64)
    assert tokenizer.decode(encoded.rows[0]) == "<|user|>\nq<|eos|>\n<|assistant|>\ngood<|eos|>"


def test_tokens_that_join_prompt_and_answer_are_the_answers(trained):
    tokenizer = trained.with_chat_template(LINES)
    assert len(trained.encode("\n\n\n")) < len(trained.encode("\n")) * 3  # so they do merge
    record = record_of("\n\n bad", "good")
    ((encoded,), _) = encode_feedback([record], tokenizer, 64)
    prompt = tokenizer.encode_chat(record.prompt, add_generation_prompt=True)
    assert encoded.starts == (len(prompt) - 1, len(prompt))
    assert tokenizer.decode(encoded.rows[0][encoded.starts[0] :]) == "\n\n\n bad<|eos|>"


def test_templates_that_cannot_tell_answers_apart_are_refused(trained):
    with pytest.raises(ValueError, match="f:1: the chat template renders this prompt otherwise"):
        encode_feedback([record_of("a", "b")], trained.with_chat_template(COUNTING), 64)


def test_what_does_not_fit_is_left_out_and_named():
    records = [
        record_of("a" * 4, "b" * 5, "c" * 3, identity="f:1"),
        record_of("a" * 5, "b" * 4, identity="f:2"),
        record_of("a", "b", prompt="long" * 9, identity="f:3"),
        record_of("a", "b", levels=(1, 1), identity="f:4"),
        record_of("a" * 4, "b", identity="f:5"),
    ]
    encoded, cut = encode_feedback(records, byte_tokenizer(), 10)  # five, four bytes and the end
    assert [(each.id, each.levels) for each in encoded] == [("f:1", (3, 1)), ("f:5", (2, 1))]
    assert cut == ["f:1", "f:2", "f:3"]
    encoded, cut = encode_feedback(records, byte_tokenizer(), 10, pairs_only=False)
    assert [(each.id, each.levels) for each in encoded] == [
        ("f:1", (3, 1)), ("f:2", (1,)), ("f:4", (1, 1)), ("f:5", (2, 1))
    ]  # fmt: skip
    assert cut == ["f:1", "f:2", "f:3"]


# --- Batches --------------------------------------------------------------------------------

LENGTH, SLOTS = 16, 3


def batching(**fields):
    return ComparisonsConfig(
        **{"length_tokens": LENGTH, "batch_prompts": 4, "max_responses": SLOTS, **fields}
    )


@pytest.fixture(scope="module")
def encoded():
    """23 prompts, p.. to its number, with two to six responses; a lower letter is better."""
    records = [
        record_of(*(f"{letter}{i:02}" for letter in "abcdef"[: 2 + i % 5]), prompt=f"p{i:02}")
        for i in range(23)
    ]
    return encode_feedback(records, byte_tokenizer(), LENGTH)[0]


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def responses_of(batch):
    """Each prompt of a batch with its (text of prompt, text of response, level), by the arrays."""
    found = []
    tokenizer = byte_tokenizer()
    for row in range(len(batch["levels"])):
        slots = []
        for slot in np.flatnonzero(batch["present"][row]):
            here = slice(slot * LENGTH, (slot + 1) * LENGTH)
            tokens, mask = batch["tokens"][row, here], batch["response_mask"][row, here]
            real = batch["segment_ids"][row, here] > 0
            prompt = tokenizer.decode(tokens[real & (mask == 0)], skip_control=True)
            said = tokenizer.decode(tokens[mask == 1])
            slots.append((prompt, said.removesuffix("<|eos|>"), batch["levels"][row, slot]))
        found.append(slots)
    return found


def test_batches_are_laid_out_as_the_losses_expect(encoded):
    (batch,) = take(ComparisonBatches(encoded, batching()), 1)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "tokens": ("int32", (4, SLOTS * LENGTH)),
        "segment_ids": ("int32", (4, SLOTS * LENGTH)),
        "positions": ("int32", (4, SLOTS * LENGTH)),
        "response_mask": ("float32", (4, SLOTS * LENGTH)),
        "levels": ("float32", (4, SLOTS)),
        "present": ("bool", (4, SLOTS)),
        "margins": ("float32", (4,)),
        "cursor": ("uint32", ()),
    }


def test_a_slot_is_prompt_answer_and_padding():
    record = from_row({"prompt": "q", "chosen": "yes", "rejected": "n", "margin": 1.5}, "auto")
    encoded, _ = encode_feedback([record], byte_tokenizer(), 10)
    q, y, e, s, n = b"qyesn"
    bos, eos, asks, says = 256, 257, 260, 261
    nothing = 10 * [0]
    expected = {
        False: {
            "tokens": [bos, asks, q, eos, says, y, e, s, eos, 0]
            + [bos, asks, q, eos, says, n, eos, 0, 0, 0]
            + nothing,
            "segment_ids": 9 * [1] + [0] + 7 * [1] + 3 * [0] + nothing,
            "positions": [*range(9), 0] + [*range(7), 0, 0, 0] + nothing,
            "response_mask": 5 * [0] + 4 * [1] + [0] + 5 * [0] + 2 * [1] + 3 * [0] + nothing,
        },
        True: {
            "tokens": [0, bos, asks, q, eos, says, y, e, s, eos]
            + [0, 0, 0, bos, asks, q, eos, says, n, eos]
            + nothing,
            "segment_ids": [0] + 9 * [1] + 3 * [0] + 7 * [1] + nothing,
            "positions": [0, *range(9)] + [0, 0, 0, *range(7)] + nothing,
            "response_mask": 6 * [0] + 4 * [1] + 8 * [0] + 2 * [1] + nothing,
        },
    }
    for pad_left, arrays in expected.items():
        config = batching(length_tokens=10, batch_prompts=1, pad_left=pad_left)
        (batch,) = take(ComparisonBatches(encoded, config), 1)
        assert {name: batch[name][0].tolist() for name in arrays} == arrays
        assert batch["levels"].tolist() == [[1, 0, 0]] and batch["margins"].tolist() == [1.5]
        assert batch["present"].tolist() == [[True, True, False]]


def test_every_pair_of_a_batch_is_in_its_order(encoded):
    pairs = 0
    for batch in take(ComparisonBatches(encoded, batching()), 30):
        for slots in responses_of(batch):
            prompts = {prompt for prompt, _, _ in slots}
            assert {f"p{said[1:]}" for _, said, _ in slots} == prompts and len(prompts) == 1
            by_level = [said for _, said, _ in sorted(slots, key=lambda slot: -slot[2])]
            assert by_level == sorted(by_level)
            pairs += len(slots) * (len(slots) - 1) // 2
    assert pairs > 120


def test_epochs_visit_each_prompt_once_in_orders_of_their_own(encoded):
    batches = take(ComparisonBatches(encoded, batching(batch_prompts=1)), 3 * 23)
    seen = [responses_of(batch)[0][0][0] for batch in batches]
    epochs = [seen[start : start + 23] for start in (0, 23, 46)]
    assert all(sorted(epoch) == [f"p{i:02}" for i in range(23)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = take(ComparisonBatches(encoded, batching(batch_prompts=1, seed=1)), 23)
    assert [responses_of(batch)[0][0][0] for batch in other] != epochs[0]


@pytest.mark.parametrize("odd_level", [2, 0])
def test_of_many_responses_each_epoch_draws_some_that_differ(odd_level):
    record = record_of(*"abcdefgh", levels=(1, 1, 1, 1, 1, 1, 1, odd_level))
    encoded, _ = encode_feedback([record], byte_tokenizer(), LENGTH)
    config = batching(batch_prompts=1, max_responses=2)
    drawn = [responses_of(b)[0] for b in take(ComparisonBatches(encoded, config), 200)]
    # The one better (or worse) response is always there; against it, all others in turn.
    assert all({level for _, _, level in slots} == {1, odd_level} for slots in drawn)
    counts = {letter: 0 for letter in "abcdefg"}
    for slots in drawn:
        counts[min(said for _, said, _ in slots)] += 1
    # 200 ÷ 7 ≈ 29 each, standard deviation 5: within four of them.
    assert all(9 <= count <= 49 for count in counts.values())


def test_records_of_the_same_responses_stand_together_and_draw_the_same():
    """Whatever the order in the file, of the records and of their responses."""
    letters = "abcdefgh"
    films = [[f"{letter}{film}" for letter in letters] for film in range(6)]
    good = [
        record_of(*film, levels=(1, 1, 1, 1, 0, 0, 0, 0), prompt=f"good{number}")
        for number, film in enumerate(films)
    ]
    bad = [
        record_of(*reversed(film), levels=(1, 1, 1, 1, 0, 0, 0, 0), prompt=f"bad{number}")
        for number, film in enumerate(films)
    ]
    encoded, _ = encode_feedback(good + bad[::-1], byte_tokenizer(), LENGTH)
    batches = take(ComparisonBatches(encoded, batching(batch_prompts=2)), 18)
    orders, draws = [], set()
    for batch in batches:
        (first, second) = responses_of(batch)
        (one, *_), (other, *_) = first, second
        assert one[0][-1] == other[0][-1] and {one[0][:-1], other[0][:-1]} == {"good", "bad"}
        first_levels = {said: level for _, said, level in first}
        second_levels = {said: level for _, said, level in second}
        assert first_levels == {said: 1 - level for said, level in second_levels.items()}
        orders.append(one[0][-1])
        draws.add(frozenset(said[0] for said in first_levels))
    epochs = [orders[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list("012345") for epoch in epochs)
    assert epochs[0] != epochs[1] and len(draws) > 8


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("host_count", [2, 4])
def test_hosts_share_the_same_global_batches(encoded, host_count, one_pass):
    whole = take(ComparisonBatches(encoded, batching(), one_pass=one_pass), 14)
    hosts = [
        take(
            ComparisonBatches(
                encoded, batching(), one_pass=one_pass, host_index=host, host_count=host_count
            ),
            14,
        )
        for host in range(host_count)
    ]
    joined = [
        {
            name: parts[0][name]
            if name == "cursor"
            else np.concatenate([part[name] for part in parts])
            for name in parts[0]
        }
        for parts in zip(*hosts, strict=True)
    ]
    assert_same(joined, whole)
    assert [int(batch["cursor"]) for batch in whole][-1] == (23 if one_pass else 56)


@hypothesis.given(cursor=st.integers(0, 70), size=st.sampled_from([1, 3, 8]))
@hypothesis.settings(max_examples=25, deadline=None)
def test_seeking_equals_having_run_there(encoded, cursor, size):
    one_by_one = ComparisonBatches(encoded, batching(batch_prompts=1))
    take(one_by_one, cursor)
    sought = ComparisonBatches(encoded, batching(batch_prompts=size))
    next(sought)
    sought.seek(cursor)
    for count in (1, 2):
        batch = next(sought)
        assert batch["cursor"] == cursor + count * size
        expected = take(one_by_one, size)
        for name in batch.keys() - {"cursor"}:
            rows = np.concatenate([each[name] for each in expected])
            np.testing.assert_array_equal(batch[name], rows, err_msg=name)


def test_one_pass_ends_with_padding_and_can_be_sought(encoded):
    batches = ComparisonBatches(encoded, batching(), one_pass=True)
    found = list(batches)
    assert [int(batch["cursor"]) for batch in found] == [4, 8, 12, 16, 20, 23]
    prompts = [slots[0][0] for batch in found for slots in responses_of(batch) if slots]
    assert sorted(prompts) == [f"p{i:02}" for i in range(23)]
    assert all(not array[3].any() for name, array in found[-1].items() if name != "cursor")
    batches.seek(12)
    assert_same(list(batches), found[3:])


@pytest.mark.parametrize("slots", [2, 3])
def test_spread_out_records_show_every_response_once(encoded, slots):
    """In one pass, in the records' own order, whatever is best or worst."""
    pieces = spread(encoded, slots)
    config = batching(max_responses=slots)
    found = {}
    for batch in ComparisonBatches(pieces, config, one_pass=True):
        for prompt, said, level in itertools.chain.from_iterable(responses_of(batch)):
            found.setdefault(prompt, []).append((said, level))
    assert list(found) == [f"p{i:02}" for i in range(23)]
    for i, responses in enumerate(found.values()):
        count = 2 + i % 5
        expected = [(f"{'abcdef'[n]}{i:02}", float(count - n)) for n in range(count)]
        assert sorted(responses) == expected
    # Not like beside like: two of six are any two.
    drawn = {frozenset(piece.levels) for piece in pieces if len(piece.levels) == slots}
    assert len(drawn) > 6


def test_thumbs_are_levels_of_one_and_zero():
    rows = [("q", "a", True), ("q", "b", False), ("r", "c", False)]
    records = [
        from_row({"prompt": prompt, "completion": response, "label": label}, "auto")
        for prompt, response, label in rows
    ]
    encoded, _ = encode_feedback(records, byte_tokenizer(), LENGTH, pairs_only=False)
    (batch,) = ComparisonBatches(encoded, batching(), one_pass=True)
    told = sorted(slots[0] for slots in responses_of(batch) if slots)
    assert told == [("q", "a", 1), ("q", "b", 0), ("r", "c", 0)]
    assert batch["present"].sum() == 3


def test_wrong_arguments_are_named(encoded):
    with pytest.raises(ValueError, match="length_tokens=16; raise it"):
        ComparisonBatches([], batching())
    with pytest.raises(ValueError, match="batch_prompts 4 is not divisible by 3 hosts; try 6"):
        ComparisonBatches(encoded, batching(), host_count=3)
    with pytest.raises(ValueError, match="host_index 2 is not one of 2 hosts"):
        ComparisonBatches(encoded, batching(), host_index=2, host_count=2)
    with pytest.raises(ValueError, match="cursor -1 lies outside"):
        ComparisonBatches(encoded, batching()).seek(-1)
    with pytest.raises(ValueError, match="cursor 24 lies outside the data, 0 to 23 prompts"):
        ComparisonBatches(encoded, batching(), one_pass=True).seek(24)
