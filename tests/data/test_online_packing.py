"""Online packing: rows as the model expects, states that go on exactly, other hosts refused."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from llm.data.config import DataConfig, SourceConfig
from llm.data.online_packing import OnlineBatches, OnlineStateError
from llm.data.pipeline import make_training_batches, mixture_weights
from llm.data.prepare import prepare
from llm.data.shard_writer import BadRowsError
from llm.data.tokenizer_training import byte_tokenizer
from llm.parallel.hosts import HostShare

LENGTH = 32


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def config(tmp_path):
    """Two sources in several files; texts are one capital or small letter, 1 to 99 times."""
    sources = {}
    for name, first in {"capitals": "A", "smalls": "a"}.items():
        for part in range(3):
            texts = [chr(ord(first) + part * 8 + i) * (1 + 14 * i) for i in range(8)]
            write_texts(tmp_path / f"{name}{part}.jsonl", texts)
        sources[name] = SourceConfig(
            paths=(str(tmp_path / f"{name}*.jsonl"),), validation_fraction=0.0, weight=1.0
        )
    return DataConfig(sources=sources, length_tokens=LENGTH, batch_sequences=8, packing="online")


@pytest.fixture
def make(config, tmp_path):
    """Return a function that makes batches of the config, and closes them in the end."""
    made = []

    def make(config=config, **options):
        prepared = prepare(config, byte_tokenizer(), tmp_path / "prepared")
        made.append(make_training_batches(config, prepared, byte_tokenizer(), **options))
        assert isinstance(made[-1], OnlineBatches)
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_rows_are_laid_out_as_those_of_global_packing(make):
    tokenizer, batches = byte_tokenizer(), make()
    for number in range(12):
        batch = next(batches)
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "tokens": ("int32", (8, LENGTH)),
            "targets": ("int32", (8, LENGTH)),
            "loss_weights": ("float32", (8, LENGTH)),
            "segment_ids": ("int32", (8, LENGTH)),
            "positions": ("int32", (8, LENGTH)),
            "cursor": ("uint32", ()),
        }
        assert int(batch["cursor"]) == 8 * (number + 1)
        np.testing.assert_array_equal(batch["loss_weights"], batch["segment_ids"] > 0)
        for row in range(8):
            for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                inside = batch["segment_ids"][row] == segment
                tokens, targets = batch["tokens"][row, inside], batch["targets"][row, inside]
                assert batch["positions"][row, inside].tolist() == list(range(inside.sum()))
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                letters = {t for t in [*tokens, *targets] if t < 256}
                assert len(letters) <= 1  # of one document
                assert set(tokens) - letters <= {tokenizer.bos_id}
                assert set(targets) - letters <= {tokenizer.eos_id}


def letter_counts(batches, num_batches):
    counts = collections.Counter()
    for _ in range(num_batches):
        batch = next(batches)
        targets = batch["targets"][batch["loss_weights"] > 0]
        counts.update(chr(t) for t in targets.tolist() if t < 256)
    return counts


def test_every_document_comes_round_equally_often(make):
    counts = letter_counts(make(), 60)
    rounds = {letter: counts[letter] / (1 + 14 * i) for i, letter in enumerate("ABCDEFGH")}
    # Whole passes, and a part of one: rows are filled 64 at a time.
    assert max(rounds.values()) - min(rounds.values()) <= 4 and min(rounds.values()) > 3


def test_hosts_read_different_documents(make, config):
    both = [letter_counts(make(share=HostShare(i, 2)), 6) for i in range(2)]
    assert both[0] and both[1]
    # More hosts than files: every fifth document of each.
    many = [
        letter_counts(make(_with(config, batch_sequences=10), share=HostShare(i, 5)), 3)
        for i in range(5)
    ]
    for i in range(5):
        for j in range(i):
            assert not set(many[i]) & set(many[j])


def test_sources_are_mixed_by_weight(make, config):
    sources = {
        "capitals": _with(config.sources["capitals"], weight=3.0),
        "smalls": _with(config.sources["smalls"], weight=1.0),
    }
    batch = next(make(_with(config, sources=sources)))
    capital_rows = ((batch["targets"] >= 65) & (batch["targets"] <= 90)).any(axis=1)
    assert capital_rows.sum() == 6


@pytest.mark.parametrize("taken", [1, 5, 23])
def test_a_state_goes_on_exactly_where_it_was_taken(make, taken):
    batches = make(share=HostShare(1, 2))
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(20)]
    other = make(share=HostShare(1, 2))
    next(other)
    other.set_state(state)
    for batch in expected:
        assert_same(next(other), batch)


def test_seeking_takes_the_state_from_the_journal(make, tmp_path):
    batches = make(state_dir=tmp_path / "state")
    seen = [next(batches) for _ in range(12)]
    resumed = make(state_dir=tmp_path / "state")
    for place in (7, 3, 12):
        resumed.seek(8 * place)
        for batch in seen[place : place + 4]:
            assert_same(next(resumed), batch)
    resumed.seek(0)
    assert_same(next(resumed), seen[0])
    with pytest.raises(OnlineStateError, match="has no state for cursor 9999"):
        resumed.seek(9999)
    with pytest.raises(OnlineStateError, match="without a state_dir"):
        make().seek(8)


def test_another_host_count_is_refused(make, config, tmp_path):
    batches = make(share=HostShare(0, 2), state_dir=tmp_path / "state")
    next(batches)
    with pytest.raises(OnlineStateError, match="host_count=2 and cannot go on with host_count=4"):
        make(share=HostShare(0, 4)).set_state(batches.get_state())
    # Also where only the cursor is known, and for a host that did not exist before.
    for host_index in (0, 3):
        new = make(share=HostShare(host_index, 4), state_dir=tmp_path / "state")
        with pytest.raises(OnlineStateError, match="packing='global'"):
            new.seek(8)
    with pytest.raises(OnlineStateError, match="seed=0 and cannot go on with seed=1"):
        make(_with(config, seed=1), share=HostShare(0, 2)).set_state(batches.get_state())


def test_bad_rows_stop_a_stream_too(make, config, tmp_path):
    (tmp_path / "capitals1.jsonl").write_text("{\n" * 5 + '{"text": "A"}\n')
    with pytest.raises(BadRowsError, match="source 'capitals' .*/capitals1.jsonl:1 broken JSON"):
        letter_counts(make(_with(config, max_bad_rows=4)), 10)
    assert letter_counts(make(_with(config, max_bad_rows=5)), 10)


def test_an_empty_stream_is_named(make, config, tmp_path):
    for part in range(3):
        (tmp_path / f"smalls{part}.jsonl").write_text("\n")
    with pytest.raises(OnlineStateError, match="source 'smalls' has no text"):
        next(make())


def test_weights_are_given_for_all_or_none(config):
    assert mixture_weights(config) == {"capitals": 1.0, "smalls": 1.0}
    capitals = _with(config.sources["capitals"], weight=None)
    with pytest.raises(ValueError, match="data.sources.capitals has no weight where others"):
        mixture_weights(_with(config, sources={**config.sources, "capitals": capitals}))
    none = {name: _with(source, weight=None) for name, source in config.sources.items()}
    assert mixture_weights(_with(config, sources=none)) is None


def test_streams_of_unknown_size_need_weights(make, config):
    none = {name: _with(source, weight=None) for name, source in config.sources.items()}
    with pytest.raises(ValueError, match="give every source a weight"):
        make(_with(config, sources=none))
    one = {"smalls": none["smalls"]}
    assert set("".join(letter_counts(make(_with(config, sources=one)), 1))).issubset(
        "abcdefghijklmnopqrstuvwxyz"
    )


def test_global_packing_is_the_default(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["one text", "another text"])
    source = SourceConfig(paths=(path,), validation_fraction=0.0)
    config = DataConfig(sources={"a": source}, length_tokens=8, batch_sequences=2)
    prepared = prepare(config, byte_tokenizer(), tmp_path / "prepared")
    batches = make_training_batches(config, prepared, byte_tokenizer())
    next(batches)
    batches.seek(40)
    assert int(next(batches)["cursor"]) == 42
    batches.close()


def _with(config, **fields):
    return dataclasses.replace(config, **fields)
