"""After all shards are written: of equal documents of the whole corpus the first is kept, and each
group gets its index and manifest. Functions of groups, for one machine (`prepare`) or many."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int64, UInt8, UInt64

from llm.data.disk import load_arrays
from llm.data.groups import GroupKey
from llm.data.prepared import finish_split
from llm.data.shard_writer import columns_path

_INDEX_COLUMNS = ("shard", "record", "num_tokens", "num_targets", "num_bytes")
_NEAR_COLUMNS = ("near_document", "near_id", "near_held_out", "near_share")
# Many machines settle documents by so many bits of their digests: of 20 billion, 5 million fall
# together, 120 MB to be sorted at once, and a group's 5 million travel in 4,096 arrays.
DIGEST_BITS = 12
# What becomes of a document. Held-out text goes before training text, whichever source either is
# from: what is trained on was not held out.
KEPT, REPEATED, EQUALS_HELD_OUT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class WrittenGroup:
    """A group whose shards are all on disk."""

    key: GroupKey
    directory: epath.Path
    markers: tuple[Mapping[str, object], ...]  # of each shard

    def columns(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yield columns of each shard in turn."""
        for shard in range(len(self.markers)):
            yield load_arrays(columns_path(self.directory, shard), names)

    def joined(self, *names: str) -> dict[str, np.ndarray]:
        """Return columns of all shards, joined."""
        parts = list(self.columns(names))
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Some documents of a group: their places in it and their texts' digests, two words each."""

    key: GroupKey
    places: Int64[np.ndarray, " documents"]
    digests: UInt64[np.ndarray, "documents 2"]

    def by_digest(self, bits: int) -> Iterator[tuple[int, "Documents"]]:
        """Yield them parted by the first bits of their digests: equal texts fall together."""
        part = (self.digests[:, 0] >> np.uint64(64 - bits)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        numbers, begins = np.unique(part[order], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(order, begins[1:]), strict=True):
            yield number, Documents(self.key, self.places[chosen], self.digests[chosen])


@dataclasses.dataclass(frozen=True, eq=False)
class Verdicts:
    """What becomes of some documents of a group; of those not named: KEPT."""

    places: Int64[np.ndarray, " documents"]
    verdicts: UInt8[np.ndarray, " documents"]


@dataclasses.dataclass(frozen=True)
class NearDuplicate:
    """A held-out document, by its number in the sample, that nearly occurs in a training text."""

    held_out: int
    share: float
    key: GroupKey
    training: str

    @property
    def rank(self) -> tuple:
        """The least is the one to tell of: the largest share, and of equals the first."""
        return -self.share, self.key


@dataclasses.dataclass(frozen=True)
class FinishedGroup:
    """What the report and the split's manifest tell of a group."""

    key: GroupKey
    directory: epath.Path
    digest: str
    counts: Mapping[str, int]  # of kept documents, and of dropped ones
    num_written: int  # documents before any was dropped
    near_duplicates: tuple[NearDuplicate, ...]


def first_occurrences(
    digests: UInt64[np.ndarray, "documents 2"],
) -> Int64[np.ndarray, " documents"]:
    """Return, for each text digest (a row of two words), the index of its first occurrence."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in order
    ordered = digests[order]
    begins = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def distinct_documents(group: WrittenGroup) -> Documents:
    """Return the first of equal documents of a group, however often it has them."""
    digests = group.joined("text_digest")["text_digest"]
    places = np.flatnonzero(first_occurrences(digests) == np.arange(len(digests)))
    return Documents(group.key, places, digests[places])


def settle(groups: Sequence[Documents]) -> list[tuple[GroupKey, Verdicts]]:
    """Return which documents are dropped, given all that have one of some digests.

    Each group has distinct documents; the order of `groups` does not matter.
    """
    if not groups:
        return []
    groups = sorted(groups, key=lambda documents: documents.key)
    sizes = [len(documents.places) for documents in groups]
    first = first_occurrences(np.concatenate([documents.digests for documents in groups]))
    training = np.repeat([documents.key.training for documents in groups], sizes)
    dropped = np.where(training & ~training[first], EQUALS_HELD_OUT, REPEATED).astype(np.uint8)
    verdicts = np.where(first == np.arange(len(first)), np.uint8(KEPT), dropped)
    settled = []
    for documents, of_group in zip(groups, np.split(verdicts, np.cumsum(sizes)[:-1]), strict=True):
        some = of_group != KEPT
        settled.append((documents.key, Verdicts(documents.places[some], of_group[some])))
    return settled


def finish_group(
    group: WrittenGroup,
    settled: Sequence[Verdicts],
    dtype: str,
    facts: Mapping[str, object],
) -> FinishedGroup:
    """Write index and manifest of a group, and return what to report of it.

    Args:
      settled: what `settle` returned of its documents.
      dtype: what its tokens are stored in.
      facts: what its manifest is to tell besides.
    """
    columns = group.joined(*_INDEX_COLUMNS, "text_digest")
    verdicts = _all_verdicts(columns.pop("text_digest"), settled)
    kept = verdicts == KEPT
    index = {name: column[kept] for name, column in columns.items()}
    counts = {
        "documents": int(kept.sum()),
        "tokens": int(index["num_tokens"].sum()),
        "bytes": int(index["num_bytes"].sum()),
        "dropped_repeated": int((verdicts == REPEATED).sum()),
    }
    if group.key.training:
        counts["dropped_equal_to_held_out"] = int((verdicts == EQUALS_HELD_OUT).sum())
    shards = [marker["shard"] for marker in group.markers]
    digest = finish_split(group.directory, index, shards, dtype, {**facts, **counts})
    near = tuple(_near_duplicates(group, kept)) if group.key.training else ()
    return FinishedGroup(group.key, group.directory, digest, counts, len(kept), near)


def _all_verdicts(
    digests: UInt64[np.ndarray, "documents 2"], settled: Sequence[Verdicts]
) -> UInt8[np.ndarray, " documents"]:
    first = first_occurrences(digests)
    verdicts = np.full(len(first), KEPT, np.uint8)
    for some in settled:
        verdicts[some.places] = some.verdicts
    # Later copies within the group: as the first one, which is not repeated itself if it is kept.
    later = first != np.arange(len(first))
    verdicts[later] = np.where(verdicts[first[later]] == KEPT, REPEATED, verdicts[first[later]])
    return verdicts


def _near_duplicates(group: WrittenGroup, kept: np.ndarray) -> Iterator[NearDuplicate]:
    """Yield, for each held-out document that nearly occurs in the group, the text with most of it.

    A training document that was dropped leaks nothing.
    """
    found: list[NearDuplicate] = []
    begin = 0
    for columns in group.columns((*_NEAR_COLUMNS, "num_tokens")):
        for place, name, held_out, share in zip(*map(columns.get, _NEAR_COLUMNS), strict=True):
            if kept[begin + place]:
                found.append(NearDuplicate(int(held_out), float(share), group.key, str(name)))
        begin += len(columns["num_tokens"])
    yield from most_alike(found).values()


def most_alike(found: Iterable[NearDuplicate]) -> dict[int, NearDuplicate]:
    """Return the near duplicate to tell of, for each held-out document."""
    best: dict[int, NearDuplicate] = {}
    for near in found:
        if near.held_out not in best or near.rank < best[near.held_out].rank:
            best[near.held_out] = near
    return best


def in_order(markers: Mapping[int, Mapping[str, object]]) -> tuple[Mapping[str, object], ...]:
    """Return the markers of a group's shards, given by number in any order."""
    return tuple(markers[shard] for shard in range(len(markers)))
