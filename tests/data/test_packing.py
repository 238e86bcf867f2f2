"""The pack plan: every pair once, nothing overlaps, few rows, one order for one seed."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data import packing

lengths_lists = st.lists(st.integers(0, 70), max_size=60)


def covered_pairs(plan):
    """All (document, pair) that the plan's pieces cover, with repetitions."""
    pairs = []
    for doc, start, length in zip(plan.doc, plan.start, plan.length, strict=True):
        pairs += [(int(doc), pair) for pair in range(start, start + length)]
    return sorted(pairs)


@hypothesis.given(lengths_lists, st.integers(1, 40), st.integers(0, 5))
def test_every_pair_is_covered_once_and_rows_hold_what_they_can(lengths, row_length, seed):
    plan = packing.make_pack_plan(np.array(lengths, int), row_length, seed)
    expected = [(doc, pair) for doc, length in enumerate(lengths) for pair in range(length)]
    assert covered_pairs(plan) == expected
    for first, last in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True):
        assert 0 < plan.length[first:last].sum() <= row_length
    assert plan.row_offsets[0] == 0 and plan.row_offsets[-1] == len(plan.doc)
    # Pieces of one document begin at multiples of the row length: consecutive, none cut needlessly.
    assert (plan.start % row_length == 0).all() and (plan.length > 0).all()


def naive_best_fit_decreasing(lengths, row_length):
    """One piece at a time, as textbooks have it; returns the sorted room left in each row."""
    rooms = []
    pieces = []
    for length in lengths:
        pieces += [row_length] * (length // row_length) + [length % row_length]
    for piece in sorted((p for p in pieces if p), reverse=True):
        fitting = [room for room in rooms if room >= piece]
        room = min(fitting) if fitting else row_length
        if fitting:
            rooms.remove(room)
        rooms.append(room - piece)
    return sorted(rooms)


@hypothesis.given(lengths_lists, st.integers(1, 40), st.integers(0, 5))
def test_placing_equal_pieces_together_is_best_fit_decreasing(lengths, row_length, seed):
    plan = packing.make_pack_plan(np.array(lengths, int), row_length, seed)
    rooms = [
        row_length - int(plan.length[first:last].sum())
        for first, last in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True)
    ]
    assert sorted(rooms) == naive_best_fit_decreasing(lengths, row_length)


def test_a_plan_small_enough_to_write_down():
    plan = packing.make_pack_plan(np.array([9, 3, 1]), row_length=4, seed=0)
    pieces = np.stack([plan.doc, plan.start, plan.length], axis=1).tolist()
    rows = [
        sorted(map(tuple, pieces[a:b]))
        for a, b in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True)
    ]
    full = [[(0, 0, 4)], [(0, 4, 4)]]
    # The single pairs are the last one of document 0 and document 2; either may join document 1.
    assert sorted(rows) in (
        sorted([*full, [(0, 8, 1), (1, 0, 3)], [(2, 0, 1)]]),
        sorted([*full, [(1, 0, 3), (2, 0, 1)], [(0, 8, 1)]]),
    )
    assert plan.fill_rate == 13 / 16


def test_a_million_documents_fill_their_rows():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(int)
    plan = packing.make_pack_plan(lengths, 1024, seed=0)
    assert plan.num_pairs == lengths.sum()
    assert plan.fill_rate > 0.998


def test_the_seed_alone_decides_among_equal_plans():
    plan = packing.make_pack_plan(np.arange(1, 200), 64, seed=3)
    other = packing.make_pack_plan(np.arange(1, 200), 64, seed=4)
    assert other.num_rows == plan.num_rows and (other.doc != plan.doc).any()
    assert packing.make_pack_plan(np.arange(1, 200), 64, seed=3).digest == plan.digest


def test_permutations_never_change_with_a_library_version():
    # Literals: Philox 4x64-10 keyed by SHA-256; a numpy or platform that differs breaks resuming.
    assert packing.permutation(8, "rows", 0, 0).tolist() == [3, 2, 4, 7, 6, 5, 0, 1]
    assert packing.permutation(8, "rows", 0, 1).tolist() == [5, 0, 4, 6, 1, 2, 7, 3]


def test_plan_is_cached_and_damage_is_noticed(tmp_path):
    lengths = np.arange(1, 300)
    made = packing.load_pack_plan(lengths, 32, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert packing.load_pack_plan(lengths, 32, 0, tmp_path).digest == made.digest
    assert path.stat().st_mtime_ns == written
    packing.load_pack_plan(lengths, 32, 1, tmp_path)
    packing.load_pack_plan(lengths, 64, 0, tmp_path)
    packing.load_pack_plan(lengths[:-1], 32, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4

    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", flip_bit(whole, len(whole) // 2)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged"):
            assert packing.load_pack_plan(lengths, 32, 0, tmp_path).digest == made.digest
        assert path.read_bytes() == whole


def test_a_recorded_digest_that_does_not_match_is_noticed(tmp_path):
    plan = packing.load_pack_plan(np.arange(1, 50), 32, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    with np.load(path) as saved:
        arrays = dict(saved)
    arrays["start"] = arrays["start"] + 1
    np.savez(path, **arrays)
    with pytest.warns(UserWarning, match="digest"):
        assert packing.load_pack_plan(np.arange(1, 50), 32, 0, tmp_path).digest == plan.digest


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="row_length is 0"):
        packing.make_pack_plan(np.array([1]), 0, 0)
    with pytest.raises(ValueError, match="lengths must be"):
        packing.make_pack_plan(np.array([1, -1]), 4, 0)


def flip_bit(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
