"""Batches: each pair once an epoch, and nothing but the cursor decides what comes next."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data.loader import make_batches, make_evaluation_batches
from llm.data.prepared import StoredDocument, write_split

LENGTH = 16


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Two sources whose every token tells its document and place: doc · 64 + place."""
    made = {}
    for source, (first, count) in {"prose": (0, 60), "code": (400, 23)}.items():
        sizes = np.random.default_rng(first).integers(2, 60, count)
        stored = [
            StoredDocument(64 * (first + i) + np.arange(n), int(n)) for i, n in enumerate(sizes)
        ]
        made[source] = write_split(tmp_path_factory.mktemp(source), stored, vocab_size=2**15)
    return made


def take(batches, count):
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def pairs_of(batches):
    """All (input, target) of the batches that carry loss."""
    found = []
    for batch in batches:
        real = batch["loss_weights"] > 0
        found += zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True)
    return sorted(found)


def expected_pairs(*splits):
    found = []
    for split in splits:
        for tokens in map(split.tokens, range(split.num_documents)):
            found += zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
    return sorted(found)


def test_one_epoch_is_every_pair_once(splits):
    batches = list(make_batches(splits, None, LENGTH, 4, seed=0, num_epochs=1))
    assert pairs_of(batches) == expected_pairs(*splits.values())
    two = list(make_batches(splits, None, LENGTH, 4, seed=0, num_epochs=2))
    assert pairs_of(two) == sorted(2 * expected_pairs(*splits.values()))
    one_source = list(make_batches({"code": splits["code"]}, None, LENGTH, 4, 0, num_epochs=1))
    assert pairs_of(one_source) == expected_pairs(splits["code"])


def test_unique_rows_are_repeated_in_another_order(splits):
    batches = make_batches(splits, None, LENGTH, 1, seed=3, unique_rows=10)
    rows = [tuple(map(int, batch["tokens"][0])) for batch in take(batches, 30)]
    epochs = [rows[:10], rows[10:20], rows[20:]]
    assert len(set(rows)) == 10
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    everything = {
        tuple(map(int, r))
        for b in take(make_batches(splits, None, LENGTH, 8, 3), 20)
        for r in b["tokens"]
    }
    assert set(rows) <= everything
    sought = make_batches(splits, None, LENGTH, 1, seed=3, unique_rows=10, cursor=17)
    assert tuple(map(int, next(sought)["tokens"][0])) == rows[17]


def test_unique_rows_must_exist_and_have_no_weights(splits):
    with pytest.raises(ValueError, match="there are"):
        make_batches(splits, None, LENGTH, 1, seed=0, unique_rows=10**6)
    with pytest.raises(ValueError, match="weights"):
        make_batches(splits, {"prose": 0.5, "code": 0.5}, LENGTH, 1, seed=0, unique_rows=3)


def test_rows_are_laid_out_as_the_model_expects(splits):
    (batch,) = take(make_batches(splits, None, LENGTH, 8, seed=1), 1)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "tokens": ("int32", (8, LENGTH)),
        "targets": ("int32", (8, LENGTH)),
        "loss_weights": ("float32", (8, LENGTH)),
        "segment_ids": ("int32", (8, LENGTH)),
        "positions": ("int32", (8, LENGTH)),
        "cursor": ("uint32", ()),
    }
    for row in range(8):
        segments, tokens = batch["segment_ids"][row], batch["tokens"][row]
        used = int((segments > 0).sum())
        # Pieces from the left, numbered 1, 2, …; then padding, which is zero everywhere.
        assert (segments[:used] > 0).all() and set(np.diff(segments[:used])) <= {0, 1}
        assert segments[0] == 1
        for name in ("tokens", "targets", "loss_weights", "positions"):
            assert (batch[name][row, used:] == 0).all()
        assert (batch["loss_weights"][row, :used] == 1).all()
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            assert batch["positions"][row, inside].tolist() == list(range(inside.sum()))
            # One document, consecutive; a target is the token after its input.
            assert set(np.diff(tokens[inside])) <= {1}
            assert (batch["targets"][row, inside] == tokens[inside] + 1).all()
            assert len(set(tokens[inside] // 64)) == 1


def test_cursors_count_global_rows(splits):
    batches = take(make_batches(splits, None, LENGTH, 8, seed=0, host_index=1, host_count=2), 3)
    assert [int(batch["cursor"]) for batch in batches] == [8, 16, 24]
    assert all(isinstance(batch["cursor"], np.uint32) for batch in batches)
    assert all(len(batch["tokens"]) == 4 for batch in batches)


WEIGHTS = [None, {"prose": 0.7, "code": 0.3}]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("host_count", [2, 4, 8])
def test_hosts_share_the_same_global_batches(splits, weights, host_count):
    whole = take(make_batches(splits, weights, LENGTH, 8, seed=5), 20)
    parts = [
        take(
            make_batches(
                splits, weights, LENGTH, 8, seed=5, host_index=host, host_count=host_count
            ),
            20,
        )
        for host in range(host_count)
    ]
    joined = [
        {
            name: slices[0][name]
            if name == "cursor"
            else np.concatenate([part[name] for part in slices])
            for name in slices[0]
        }
        for slices in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize(("num_workers", "prefetch"), [(0, 0), (1, 1), (2, 4), (4, 9)])
def test_workers_change_nothing(splits, num_workers, prefetch):
    expected = take(make_batches(splits, WEIGHTS[1], LENGTH, 4, seed=2), 30)
    batches = make_batches(
        splits, WEIGHTS[1], LENGTH, 4, seed=2, num_workers=num_workers, prefetch=prefetch
    )
    assert_same(take(batches, 30), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@hypothesis.given(cursor=st.integers(0, 400), batch=st.sampled_from([1, 3, 8]))
@hypothesis.settings(max_examples=20, deadline=None)
def test_seeking_equals_having_run_there(splits, weights, cursor, batch):
    # Row by row, over several epochs; the batch size may differ from the one before.
    rows = make_batches(splits, weights, LENGTH, 1, seed=0, cursor=0)
    for _ in range(cursor):
        next(rows)
    sought = make_batches(splits, weights, LENGTH, batch, seed=0)
    next(sought)
    sought.seek(cursor)
    for expected_cursor in (cursor + batch, cursor + 2 * batch):
        found = next(sought)
        assert int(found["cursor"]) == expected_cursor
        for row in range(batch):
            one = next(rows)
            for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions"):
                np.testing.assert_array_equal(found[name][row], one[name][0])
    rows.close()
    sought.close()


def test_mixtures_give_rows_by_weight_and_repeat_the_smaller_source(splits):
    batches = make_batches(splits, {"prose": 0.25, "code": 0.75}, LENGTH, 1, seed=0)
    num_rows = {name: plan.num_rows for name, plan in batches.rows.of_source.items()}
    total = 4 * num_rows["code"]  # three epochs of code
    found = take(batches, total)
    from_code = [batch["tokens"][0, 0] >= 64 * 400 for batch in found]
    assert sum(from_code) == 3 * num_rows["code"]
    code = [batch for batch, is_code in zip(found, from_code, strict=True) if is_code]
    assert pairs_of(code) == sorted(3 * expected_pairs(splits["code"]))
    # Epochs differ in order.
    epochs = [
        [int(b["tokens"][0, 0]) for b in code[i::1][: num_rows["code"]]]
        for i in (0, num_rows["code"])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_a_weighted_epoch_ends_before_any_row_comes_twice(splits):
    batches = list(make_batches(splits, {"prose": 0.5, "code": 0.5}, LENGTH, 1, 0, num_epochs=1))
    pairs = pairs_of(batches)
    assert len(set(pairs)) == len(pairs)
    from_code = [batch for batch in batches if batch["tokens"][0, 0] >= 64 * 400]
    assert pairs_of(from_code) == expected_pairs(splits["code"])


def test_seeds_differ_and_the_order_of_names_does_not(splits):
    def tokens(seed, order=("prose", "code")):
        weights = {name: {"prose": 2.0, "code": 1.0}[name] for name in order}
        (batch,) = take(make_batches({n: splits[n] for n in order}, weights, LENGTH, 8, seed), 1)
        return batch["tokens"].tolist()

    assert tokens(0) == tokens(0, ("code", "prose"))
    assert tokens(0) != tokens(1)


@pytest.mark.parametrize("host_count", [1, 2])
def test_evaluation_is_one_padded_pass(splits, host_count):
    split = splits["prose"]
    hosts = [
        list(make_evaluation_batches(split, LENGTH, 8, host_index=host, host_count=host_count))
        for host in range(host_count)
    ]
    assert pairs_of([batch for host in hosts for batch in host]) == expected_pairs(split)
    assert len({len(host) for host in hosts}) == 1
    last = hosts[-1][-1]
    assert last["tokens"].shape == (8 // host_count, LENGTH)
    assert (last["loss_weights"][-1] == 0).all() and (last["segment_ids"][-1] == 0).all()
    again = list(make_evaluation_batches(split, LENGTH, 8, host_index=0, host_count=host_count))
    assert_same(again, hosts[0])


def test_finite_batches_end_and_can_be_sought_again(splits):
    batches = make_batches(splits, None, LENGTH, 4, seed=0, num_epochs=1)
    found = list(batches)
    with pytest.raises(StopIteration):
        next(batches)
    batches.seek(int(found[0]["cursor"]))
    assert_same(list(batches), found[1:])
    batches.seek(int(found[-1]["cursor"]))
    assert list(batches) == []


def test_masked_tokens_carry_no_loss_as_targets(tmp_path):
    stored = [StoredDocument([1, 10, 11, 12, 2], 5, loss_mask=[False] * 3 + [True] * 2)]
    split = write_split(tmp_path, stored, vocab_size=64, masked=True)
    (batch,) = make_evaluation_batches(split, 6, 1)
    assert batch["tokens"].tolist() == [[1, 10, 11, 12, 0, 0]]
    assert batch["targets"].tolist() == [[10, 11, 12, 2, 0, 0]]
    assert batch["loss_weights"].tolist() == [[0, 0, 1, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 0, 0]]


def test_wrong_arguments_are_named(splits, tmp_path):
    with pytest.raises(ValueError, match="batch_sequences 6 is not divisible by 4 hosts; try 8"):
        make_batches(splits, None, LENGTH, 6, 0, host_count=4)
    with pytest.raises(ValueError, match="host_index 2 is not one of 2 hosts"):
        make_batches(splits, None, LENGTH, 4, 0, host_index=2, host_count=2)
    with pytest.raises(
        ValueError, match="source 'poems', which is not prepared; prepared are code"
    ):
        make_batches(splits, {"poems": 1.0}, LENGTH, 4, 0)
    with pytest.raises(ValueError, match="cursor -1 lies outside"):
        make_batches(splits, None, LENGTH, 4, 0, cursor=-1)
    empty = write_split(tmp_path / "empty", [], vocab_size=64)
    with pytest.raises(ValueError, match="source 'empty' has no text"):
        make_batches({"empty": empty}, None, LENGTH, 4, 0)
