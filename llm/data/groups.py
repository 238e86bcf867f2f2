"""How a corpus is cut: parts of a source are put together to shards, and shards dealt to groups.
A group has an index and a pack plan of its own, so that no machine ever holds all documents."""

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from llm.data.grouped import group_path
from llm.data.sources import Shard, Split

# Small files are put together into shards of at least this size, and a group has at most so many
# shards (each an open file while it is read).
_SHARD_BYTES = 16 * 2**20
_MAX_SHARDS = 256


class GroupKey(NamedTuple):
    """Which group it is. Keys sort as documents count: of equal ones the first is kept."""

    training: bool  # held-out text comes first
    source: str
    number: int

    @property
    def split(self) -> Split:
        return "train" if self.training else "validation"


@dataclasses.dataclass(frozen=True)
class Group:
    """Shards that get one index: the parts of a source that go into each of them."""

    key: GroupKey
    directory: epath.Path
    shards: tuple[tuple[Shard, ...], ...]


def make_groups(
    split: Split, source: str, parts: Sequence[Shard], directory: epath.Path
) -> list[Group]:
    """Return the groups that a split's parts are prepared in: one, or several of equal sizes.

    Shards are dealt out in turn: each group is a sample of all of the source, however the source
    is ordered, and so is a run's window of a few groups.

    Args:
      directory: the split's, of which one group has all, and several a folder each.
    """
    shards = group_parts(parts)
    count = -(-len(shards) // _MAX_SHARDS)
    return [
        Group(
            GroupKey(split == "train", source, number),
            group_path(directory, number) if count > 1 else directory,
            tuple(shards[number::count]),
        )
        for number in range(count)
    ]


def group_parts(parts: Sequence[Shard]) -> list[tuple[Shard, ...]]:
    """Return consecutive parts of a source put together to what becomes one shard each.

    Whole local files are put together up to a useful size; ranges of larger ones stand alone.
    """
    groups: list[list[Shard]] = []
    room = 0
    for part in parts:
        whole_file = part.stop is None and os.path.isfile(part.name)
        size = os.path.getsize(part.name) if whole_file else _SHARD_BYTES
        if size > room:
            groups.append([])
            room = _SHARD_BYTES
        groups[-1].append(part)
        room -= size
    return [tuple(group) for group in groups] or [()]
