"""The packed rows of a split, numbered through its groups, and the order in which an epoch visits
rows. Of a large split only the groups that are being read are held in memory."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, Int64

from llm.data.caching import locked_cache
from llm.data.config import DataConfig
from llm.data.disk import read_json_object, write_json
from llm.data.grouped import WINDOW_GROUPS
from llm.data.packing import ALGORITHM, PackPlan, concatenated_ranges, load_pack_plan, permutation
from llm.data.prepared import PreparedSplit
from llm.data.sources import Split


class SplitRows:
    """Where the packed rows of a split lie: rows of its first group, then those of its second …"""

    def __init__(self, split: PreparedSplit, row_length: int, seed: int):
        self.split = split
        self._row_length, self._seed = row_length, seed
        # Two windows' plans, as of the groups themselves.
        self._plan = locked_cache(2 * WINDOW_GROUPS, self._load_plan)
        sizes = self._sizes()
        self.group_rows: Int64[np.ndarray, " groups"] = np.array([rows for rows, _ in sizes])
        self.num_pairs = sum(pairs for _, pairs in sizes)
        self._ends = np.cumsum(self.group_rows)

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1])

    @property
    def fill_rate(self) -> float:
        """Share of all row positions that hold a pair; the rest is padding."""
        return self.num_pairs / max(1, self.num_rows * self._row_length)

    def by_group(
        self, rows: Int[np.ndarray, " rows"]
    ) -> Iterator[tuple[np.ndarray, PreparedSplit, PackPlan, np.ndarray]]:
        """Yield, for each group in turn, the places in `rows` of those that lie in it, the group
        with its plan, and which rows of the plan they are."""
        number = np.searchsorted(self._ends, rows, side="right")
        for group in np.unique(number).tolist():
            places = np.flatnonzero(number == group)
            plan_rows = rows[places] - (self._ends - self.group_rows)[group]
            yield places, self.split.groups[group], self._plan(group), plan_rows

    def _load_plan(self, group: int) -> PackPlan:
        return group_plan(self.split.groups[group], self._row_length, self._seed)

    def _sizes(self) -> list[tuple[int, int]]:
        """Return rows and pairs of each group."""
        count = len(self.split.groups)
        if count == 1:
            return [plan_size(self._plan(0))]
        sizes = _read_sizes(self.split, self._row_length, self._seed)
        if sizes is None:
            sizes = [
                plan_size(group_plan(group, self._row_length, self._seed))
                for group in self.split.groups
            ]
            with contextlib.suppress(OSError):  # read-only: counted anew at each start
                write_sizes(self.split, self._row_length, self._seed, sizes)
        return sizes


def plan_seed(config: DataConfig, split: Split) -> int:
    """Return the seed of a split's plans: `make_evaluation_batches` reads the same for any run."""
    return config.seed if split == "train" else 0


def group_plan(group: PreparedSplit, row_length: int, seed: int) -> PackPlan:
    """Return the pack plan of a group, kept beside it."""
    return load_pack_plan(group.packed_pairs(row_length), row_length, seed, group.path / "plans")


def plan_size(plan: PackPlan) -> tuple[int, int]:
    """Return how many rows and pairs a plan has."""
    return plan.num_rows, plan.num_pairs


def write_sizes(
    split: PreparedSplit, row_length: int, seed: int, sizes: Sequence[tuple[int, int]]
) -> None:
    """Keep the sizes of the plans of all groups, so that a run need not load them all to count."""
    path, digest = _sizes_file(split, row_length, seed)
    write_json(path, {"digest": digest, "sizes": [list(size) for size in sizes]})


def _read_sizes(split: PreparedSplit, row_length: int, seed: int) -> list[tuple[int, int]] | None:
    path, digest = _sizes_file(split, row_length, seed)
    try:
        found = read_json_object(path)
        sizes = [(int(rows), int(pairs)) for rows, pairs in found["sizes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sizes if found["digest"] == digest and len(sizes) == len(split.groups) else None


def _sizes_file(split: PreparedSplit, row_length: int, seed: int) -> tuple[epath.Path, str]:
    digest = hashlib.sha256(f"{ALGORITHM},{row_length},{seed},{split.digest}".encode()).hexdigest()
    return split.path / "plans" / f"sizes-{digest[:32]}.json", digest


class RowOrder:
    """The order in which an epoch visits rows that lie in groups.

    One random order of all rows; or, `windowed`, groups in random order, so many at a time, and
    the rows of each such window in one random order. Either is a pure function of group sizes,
    seed, epoch and place, and needs no more than a window's groups in memory.
    """

    def __init__(
        self,
        group_rows: Int[np.ndarray, " groups"],
        seed: int,
        *,
        windowed: bool = False,
        window_groups: int = WINDOW_GROUPS,
    ):
        self._group_rows = np.asarray(group_rows, np.int64)
        self._firsts = np.cumsum(self._group_rows) - self._group_rows
        self._seed, self._windowed = seed, windowed
        self._window_groups = window_groups if windowed else max(1, len(self._group_rows))
        self._order = locked_cache(2, self._make_order)
        self._window = locked_cache(2, self._make_window)

    @property
    def num_rows(self) -> int:
        return int(self._group_rows.sum())

    def rows(
        self, epochs: Int[np.ndarray, " rows"], places: Int[np.ndarray, " rows"]
    ) -> Int64[np.ndarray, " rows"]:
        """Return which row is at each place of each epoch."""
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            _, ends = self._order(epoch)
            window = np.searchsorted(ends, places[of_epoch], side="right")
            for number in np.unique(window).tolist():
                mine = of_epoch[window == number]
                begin = ends[number - 1] if number else 0
                found[mine] = self._window(epoch, number)[places[mine] - begin]
        return found

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups as the epoch visits them, and where each window ends."""
        groups = np.arange(len(self._group_rows))
        if self._windowed:
            groups = permutation(len(groups), "groups", self._seed, epoch)
        starts = np.arange(0, len(groups), self._window_groups)
        return groups, np.cumsum(np.add.reduceat(self._group_rows[groups], starts))

    def _make_window(self, epoch: int, number: int) -> np.ndarray:
        order, _ = self._order(epoch)
        groups = order[number * self._window_groups :][: self._window_groups]
        rows = concatenated_ranges(self._firsts[groups], self._group_rows[groups])
        key = (self._seed, epoch, number) if self._windowed else (self._seed, epoch)
        return rows[permutation(len(rows), "rows", *key)]
