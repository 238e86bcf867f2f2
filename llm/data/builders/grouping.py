"""What must not be cut by a split: groups of documents, merged where their texts overlap.
Used by the corpus builders, so that held-out text is not (nearly) training text."""

import collections
import hashlib
import re
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Row = TypeVar("Row")

# Postings read a shingle: phrases that dozens of documents share are boilerplate, not copies.
_MAX_POSTINGS = 20


def word_shingles(text: str, width: int = 6) -> set[int]:
    """Return hashes of all runs of `width` words, case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return _hash_runs(words, width, " ")


def character_shingles(text: str, width: int = 5) -> set[int]:
    """Return hashes of all runs of `width` letters, for scripts without spaces."""
    return _hash_runs(re.findall(r"\w", text.lower()), width, "")


def _hash_runs(items: list[str], width: int, joint: str) -> set[int]:
    # A text shorter than a run counts as one run, so that equal short texts still meet.
    count = max(1, len(items) - width + 1)
    # crc32, not hash(): the same in every process.
    return {zlib.crc32(joint.join(items[i : i + width]).encode()) for i in range(count)}


class Groups:
    """Disjoint sets of names (union-find); a set is called by its smallest name."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """Return the name of the set that holds `name`."""
        root = name
        while self._parent.get(root, root) != root:
            root = self._parent[root]
        while name != root:  # path compression
            self._parent[name], name = root, self._parent.get(name, name)
        return root

    def merge(self, one: str, other: str) -> None:
        """Put the sets of both names together."""
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first


def merge_similar(
    texts: Iterable[tuple[str, str]],
    shingles: Callable[[str], set[int]],
    *,
    threshold: float,
    sample_every: int = 1,
    groups: Groups | None = None,
) -> Groups:
    """Merge the groups of texts whose shingles' Jaccard similarity reaches `threshold`.

    Args:
      texts: (group, text) pairs; texts of one group are not compared.
      shingles: makes a text's set of hashes.
      threshold: in (0, 1].
      sample_every: keep one hash in so many (by value, so both texts keep the same ones).
      groups: merge into these, by default into new ones.
    """
    groups = groups or Groups()
    owners: list[str] = []
    sizes: list[int] = []
    postings: dict[int, list[int]] = collections.defaultdict(list)
    for index, (group, text) in enumerate(texts):
        kept = {value for value in shingles(text) if value % sample_every == 0}
        owners.append(group)
        sizes.append(len(kept))
        shared: collections.Counter[int] = collections.Counter()
        for value in kept:
            earlier = postings[value]
            shared.update(earlier)
            if len(earlier) < _MAX_POSTINGS:
                earlier.append(index)
        for other, count in shared.items():
            if count >= threshold * (sizes[index] + sizes[other] - count):
                groups.merge(group, owners[other])
    return groups


def hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone: which side of a split it is on."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(name: str, shares: Mapping[str, float], default: str = "train") -> str:
    """Return the split of a group: `shares` of the groups go to the splits it names."""
    position, edge = hash_fraction(name), 0.0
    for split, share in shares.items():
        edge += share
        if position < edge:
            return split
    return default


def drop_duplicates(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """Return the first row of each key, in order."""
    return list({key(row): row for row in reversed(list(rows))}.values())[::-1]
