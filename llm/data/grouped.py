"""A split of too many documents for one index: groups of shards, each a `PreparedSplit`.
Groups are opened when a row of theirs is read; only sizes and digests are held of the others."""

import contextlib
import functools
import hashlib
import resource
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, Int64, UInt

from llm.data.caching import locked_cache
from llm.data.disk import write_json
from llm.data.prepared import (
    FORMAT_VERSION,
    PreparedDataError,
    PreparedSplit,
    StoredDocument,
    load_manifest,
)

# Groups whose rows are read in one random order (see RowOrder), and two such sets kept open, for a
# batch may lie in both.
WINDOW_GROUPS = 4
_OPEN_GROUPS = 2 * WINDOW_GROUPS


def group_path(directory: epath.Path, number: int) -> epath.Path:
    """Return the folder of a group of a split."""
    return directory / f"group-{number:05d}"


def open_split(path: epath.PathLike) -> PreparedSplit:
    """Open a prepared split, of whichever kind it is."""
    path = epath.Path(path)
    return GroupedSplit(path) if "groups" in load_manifest(path) else PreparedSplit(path)


def finish_groups(
    directory: epath.Path,
    groups: Sequence[Mapping[str, object]],
    details: Mapping[str, object],
) -> None:
    """Write the manifest of a split whose groups are finished.

    Args:
      groups: documents and digest of each, in order.
      details: what else the manifest tells, as in `finish_split`.
    """
    facts = {"format": FORMAT_VERSION, "groups": list(groups)}
    write_json(directory / "manifest.json", {**facts, **details})


class GroupedSplit(PreparedSplit):
    """Several prepared splits as one, whose documents are numbered through.

    `num_tokens` and its like, a number for each document, load every index: for small corpora.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.manifest = load_manifest(self.path)
        self._ends = np.cumsum([group["documents"] for group in self.manifest["groups"]])
        self._open = locked_cache(_OPEN_GROUPS, self._open_group)
        _allow_open_files()

    @property
    def groups(self) -> "_Groups":
        return _Groups(self._open, len(self._ends))

    @property
    def num_documents(self) -> int:
        return int(self._ends[-1])

    @functools.cached_property
    def digest(self) -> str:
        parts = [group["digest"] for group in self.manifest["groups"]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @functools.cached_property
    def num_tokens(self) -> Int64[np.ndarray, " documents"]:
        return np.concatenate([group.num_tokens for group in self.groups])

    @functools.cached_property
    def num_targets(self) -> Int64[np.ndarray, " documents"]:
        return np.concatenate([group.num_targets for group in self.groups])

    @functools.cached_property
    def num_bytes(self) -> Int64[np.ndarray, " documents"]:
        return np.concatenate([group.num_bytes for group in self.groups])

    def documents(self) -> Iterator[StoredDocument]:
        for group in self.groups:
            yield from group.documents()

    def read(
        self,
        doc: Int[np.ndarray, " stretches"],
        start: Int[np.ndarray, " stretches"],
        count: Int[np.ndarray, " stretches"],
    ) -> tuple[UInt[np.ndarray, " words"], Int64[np.ndarray, " stretches"]]:
        number = np.searchsorted(self._ends, doc, side="right")
        first = self._ends - np.diff(self._ends, prepend=0)
        offsets = np.cumsum(count) - count
        words = np.zeros(int(count.sum()), self._open(0).manifest["dtype"])
        for group in np.unique(number).tolist():
            mine = np.flatnonzero(number == group)
            found, begins = self._open(group).read(
                doc[mine] - first[group], start[mine], count[mine]
            )
            for stretch, begin in zip(mine, begins, strict=True):
                words[offsets[stretch] :][: count[stretch]] = found[begin:][: count[stretch]]
        return words, offsets

    def _open_group(self, number: int) -> PreparedSplit:
        group = PreparedSplit(group_path(self.path, number))
        if group.digest != self.manifest["groups"][number]["digest"]:
            raise PreparedDataError(
                f"{group.path} is not the group that {self.path}/manifest.json tells of; "
                "delete the directory and prepare it again"
            )
        return group


class _Groups(Sequence):
    """The groups of a split, opened one by one."""

    def __init__(self, open_group, count: int):
        self._open, self._count = open_group, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> PreparedSplit:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._open(number)


def _allow_open_files() -> None:
    """Let the process open as many files as it may: each shard in use is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses its own limit; it is but a help
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
