"""Splits of several groups: the same documents as in one, rows visited once an epoch, any host."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.data import groups as groups_module
from llm.data import split_rows as split_rows_module
from llm.data.grouped import WINDOW_GROUPS, GroupedSplit, open_split
from llm.data.loader import make_batches
from llm.data.packing import permutation
from llm.data.pipeline import num_truncated
from llm.data.prepare import prepare
from llm.data.prepared import PreparedDataError, PreparedSplit
from llm.data.split_rows import RowOrder, SplitRows
from llm.data.tokenizer_training import byte_tokenizer
from tests.data.mixed_corpus import mixed_config

LENGTH = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The mixed corpus prepared twice: with a group a source, and with several."""
    folder = tmp_path_factory.mktemp("groups")
    config, patch = mixed_config(folder / "corpus"), pytest.MonkeyPatch()
    whole = prepare(config, byte_tokenizer(), folder / "whole")
    patch.setattr(groups_module, "_SHARD_BYTES", 1)
    patch.setattr(groups_module, "_MAX_SHARDS", 1)
    grouped = prepare(config, byte_tokenizer(), folder / "grouped")
    patch.undo()
    return whole, grouped


def test_groups_hold_the_documents_of_the_whole(prepared):
    whole, grouped = prepared
    for name in ("books", "web"):
        one, several = whole.train[name], grouped.train[name]
        assert type(one) is PreparedSplit and type(several) is GroupedSplit
        assert len(one.groups) == 1 and len(several.groups) == 5  # a group a file, in order
        assert several.num_documents == one.num_documents
        for mine, theirs in zip(several.documents(), one.documents(), strict=True):
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)
            assert mine.num_bytes == theirs.num_bytes
        for array in ("num_tokens", "num_targets", "num_bytes", "num_pairs"):
            np.testing.assert_array_equal(getattr(several, array), getattr(one, array))
        every = np.arange(one.num_documents)[::-1]
        for split in (one, several):  # stretches of many groups at once, in any order
            words, offsets = split.read(every, np.ones_like(every), one.num_tokens[every] - 1)
            ends = offsets + one.num_tokens[every] - 1
            found = [words[a:b].tolist() for a, b in zip(offsets, ends, strict=True)]
            assert found == [one.tokens(document)[1:].tolist() for document in every.tolist()]
    cut = num_truncated({"chat": whole.train["chat"]}, LENGTH)
    assert len(grouped.train["chat"].groups) == 2 and cut["chat"] > 0
    assert num_truncated(grouped.train, LENGTH) == cut  # texts never are
    assert whole.report == grouped.report
    assert whole.train["books"].digest != grouped.train["books"].digest


def batches_of(splits, weights=None, **options):
    batches = make_batches(splits, weights, LENGTH, 16, seed=7, **options)
    yield from batches
    batches.close()


def pairs_of(batches):
    found = []
    for batch in batches:
        real = batch["loss_weights"] > 0
        found += zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True)
    return sorted(found)


def test_an_epoch_of_groups_is_every_pair_once(prepared):
    whole, grouped = ({n: p.train[n] for n in ("books", "web")} for p in prepared)
    found = list(batches_of(grouped, num_epochs=1))
    assert pairs_of(found) == pairs_of(batches_of(whole, num_epochs=1))
    # Of two epochs every other half is one, in another order of groups and rows.
    twice = list(batches_of(grouped, num_epochs=2))
    assert pairs_of(twice) == sorted(2 * pairs_of(found))


@pytest.mark.parametrize("weights", [None, {"books": 0.3, "web": 0.7}], ids=["union", "weights"])
def test_hosts_and_restarts_read_the_same_rows(prepared, weights):
    splits = {name: prepared[1].train[name] for name in ("books", "web")}
    straight = batches_of(splits, weights)
    expected = [next(straight) for _ in range(60)]  # more than an epoch of both
    assert expected[-1]["cursor"] > sum(SplitRows(s, LENGTH, 7).num_rows for s in splits.values())
    hosts = [batches_of(splits, weights, host_index=i, host_count=2) for i in range(2)]
    again = batches_of(splits, weights, cursor=int(expected[29]["cursor"]))
    for number, batch in enumerate(expected):
        parts = [next(host) for host in hosts]
        for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights"):
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), batch[name])
        if number >= 30:
            np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])


def test_a_start_opens_no_more_than_it_reads(prepared, monkeypatch):
    path = prepared[1].train["books"].path
    SplitRows(open_split(path), LENGTH, 7)  # counts the rows of all plans once
    opened = []
    real = split_rows_module.group_plan
    monkeypatch.setattr(
        split_rows_module,
        "group_plan",
        lambda group, *rest: opened.append(group.path.name) or real(group, *rest),
    )
    batches = make_batches({"books": open_split(path)}, None, LENGTH, 1, 7, num_workers=0)
    assert opened == []
    next(batches)
    assert len(opened) == 1
    (sizes,) = (path / "plans").glob("sizes-*.json")
    sizes.write_text("{")  # damaged: counted anew
    assert SplitRows(open_split(path), LENGTH, 7).num_rows == batches.rows.num_rows(1)
    assert len(opened) == 1 + 5 and json.loads(sizes.read_text())["sizes"]


def test_a_group_of_another_preparation_is_named(prepared, tmp_path):
    path = prepared[1].train["web"].path
    copy = tmp_path / "web"
    copy.mkdir()
    (copy / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
    for number, other in enumerate([0, 2, 2, 3, 4]):
        (copy / f"group-{number:05d}").symlink_to(path / f"group-{other:05d}")
    split = open_split(copy)
    assert split.groups[0].num_documents
    with pytest.raises(PreparedDataError, match="group-00001 is not the group that"):
        split.groups[1]


def test_one_order_is_that_of_runs_before_there_were_groups():
    order = RowOrder(np.array([5, 3]), seed=3)
    found = order.rows(np.zeros(8, int), np.arange(8))
    np.testing.assert_array_equal(found, permutation(8, "rows", 3, 0))


@hypothesis.given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_an_epoch_visits_each_row_once_and_a_window_few_groups(sizes, epoch, window_groups):
    order = RowOrder(np.array(sizes), seed=1, windowed=True, window_groups=window_groups)
    rows = order.rows(np.full(sum(sizes), epoch), np.arange(sum(sizes)))
    assert sorted(rows.tolist()) == list(range(sum(sizes)))
    group = np.repeat(np.arange(len(sizes)), sizes)[rows]
    # Groups that were left are not come back to: at no place are more than a window's open.
    opened, closed = {}, {}
    for place, number in enumerate(group.tolist()):
        opened.setdefault(number, place)
        closed[number] = place
    for place in range(len(rows)):
        assert sum(opened[g] <= place <= closed[g] for g in opened) <= window_groups
    # Any places, of several epochs at once, are what they are one by one.
    places = np.array([sum(sizes) - 1, 0, sum(sizes) // 2])
    mixed = order.rows(np.array([epoch, epoch + 1, epoch]), places)
    assert mixed[0] == rows[-1] and mixed[2] == rows[sum(sizes) // 2]


def test_epochs_and_seeds_have_orders_of_their_own():
    sizes, every = np.full(40, 50), np.arange(2000)
    orders = [
        RowOrder(sizes, seed, windowed=windowed).rows(np.full(2000, epoch), every)
        for windowed in (False, True)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Random orders agree in about one place (Poisson, mean 1).
            assert (one == other).sum() < 15
    # A window's groups are mixed: any run of 100 rows holds rows of all its four groups.
    windowed = orders[3] // 50
    for begin in range(0, 2000, 50 * WINDOW_GROUPS):
        for place in range(begin, begin + 50 * WINDOW_GROUPS, 100):
            assert len(set(windowed[place : place + 100])) == WINDOW_GROUPS
