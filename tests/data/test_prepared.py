"""Prepared splits: what is written is read back, and damage never passes for data."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data import prepared
from llm.data.prepared import PreparedDataError, PreparedSplit, StoredDocument, write_split


def documents(*sizes, vocab_size=8192):
    rng = np.random.default_rng(sum(sizes))
    return [StoredDocument(rng.integers(0, vocab_size, size), 3 * size) for size in sizes]


def test_documents_come_back(tmp_path):
    # 4,096 tokens fill one stored record exactly; 12,289 spill one token into a fourth.
    stored = documents(2, 4096, 1, 4097, 12_289, 30)
    split = write_split(tmp_path / "split", stored, vocab_size=8192)
    assert split.num_documents == 6
    assert split.num_tokens.tolist() == [2, 4096, 1, 4097, 12_289, 30]
    assert split.num_pairs.tolist() == [1, 4095, 0, 4096, 12_288, 29]
    assert split.num_bytes.tolist() == [6, 12_288, 3, 12_291, 36_867, 90]
    for index, document in enumerate(stored):
        assert split.tokens(index).dtype == np.int32
        np.testing.assert_array_equal(split.tokens(index), document.tokens)
    assert PreparedSplit(tmp_path / "split").digest == split.digest
    other = write_split(tmp_path / "other", documents(2, 4096, 1), vocab_size=8192)
    assert other.digest != split.digest


@pytest.fixture(scope="module")
def long_split(tmp_path_factory):
    stored = documents(9000, 5, 4100)
    return stored, write_split(tmp_path_factory.mktemp("long"), stored, vocab_size=8192)


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from([0, 2]), st.integers(0, 4000), st.integers(1, 100)),
             min_size=1, max_size=8)
)  # fmt: skip
@hypothesis.settings(deadline=None)
def test_any_stretches_can_be_read_at_once(long_split, wanted):
    stored, split = long_split
    doc, start, count = np.array(wanted).T
    words, offsets = split.read(doc, start, count)
    for (d, s, n), offset in zip(wanted, offsets, strict=True):
        np.testing.assert_array_equal(words[offset : offset + n], stored[d].tokens[s : s + n])


def test_large_vocabularies_take_four_bytes(tmp_path):
    stored = [StoredDocument([0, 65_535, 65_536, 128_255], 7)]
    split = write_split(tmp_path / "wide", stored, vocab_size=128_256)
    assert split.tokens(0).tolist() == [0, 65_535, 65_536, 128_255]
    assert split.manifest["dtype"] == "<u4"
    narrow = write_split(tmp_path / "narrow", [StoredDocument([0, 65_535], 7)], vocab_size=65_536)
    assert narrow.manifest["dtype"] == "<u2" and narrow.tokens(0).tolist() == [0, 65_535]


def test_loss_masks_are_stored_with_the_tokens(tmp_path):
    stored = [
        StoredDocument([1, 7, 8, 2], 9, loss_mask=[False, False, True, True]),
        StoredDocument([1, 5, 2], 4),
    ]
    split = write_split(tmp_path / "split", stored, vocab_size=8192, masked=True)
    words, _ = split.read(np.array([0, 1]), np.array([0, 0]), np.array([4, 3]))
    assert prepared.token_ids(words).tolist() == [1, 7, 8, 2, 1, 5, 2]
    assert prepared.loss_mask(words).tolist() == [0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="set masked"):
        write_split(tmp_path / "narrow", stored, vocab_size=8192)


def test_tokens_beyond_the_storage_are_refused(tmp_path):
    with pytest.raises(ValueError, match="token 65536 .* does not fit"):
        write_split(tmp_path / "split", [StoredDocument([0, 65_536], 1)], vocab_size=8192)
    assert not list((tmp_path / "split").iterdir())


def test_every_damage_is_noticed(tmp_path):
    write_split(tmp_path, documents(5000, 60), vocab_size=8192)
    shard, index = tmp_path / "shard-00000.array_record", tmp_path / "index.npz"

    def read_all():
        split = PreparedSplit(tmp_path)
        return [split.tokens(i) for i in range(split.num_documents)]

    whole = shard.read_bytes()
    rng = np.random.default_rng(0)
    expected = read_all()
    for position in rng.integers(0, len(whole), 40).tolist():
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            found = read_all()
        except PreparedDataError as error:
            assert "shard-00000" in str(error)
        else:  # a bit of padding between the chunks
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    # In the middle of the first record's tokens it must be noticed.
    position = whole.index(expected[0][100:110].astype("<u2").tobytes())
    shard.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
    with pytest.raises(PreparedDataError, match="damaged"):
        read_all()
    shard.write_bytes(whole[:-1])
    with pytest.raises(PreparedDataError, match="size is"):
        read_all()
    shard.unlink()
    with pytest.raises(PreparedDataError, match="is missing"):
        read_all()

    data = index.read_bytes()
    index.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(PreparedDataError, match="index.npz is damaged"):
        PreparedSplit(tmp_path)


def test_what_is_no_split_is_named(tmp_path):
    with pytest.raises(PreparedDataError, match="holds no prepared split"):
        PreparedSplit(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(PreparedDataError, match="manifest.json is damaged"):
        PreparedSplit(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(PreparedDataError, match="has format 0"):
        PreparedSplit(tmp_path)
