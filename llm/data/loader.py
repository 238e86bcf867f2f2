"""Batches of packed rows: from prepared splits to the arrays that the train step takes.
Row n of a run is a pure function of (splits, weights, row length, seed, n); hosts slice batches."""

from collections.abc import Iterator, Mapping

import grain
import numpy as np
from jaxtyping import Int

from llm.data.mixture import make_mixture
from llm.data.packing import PackPlan, concatenated_ranges, permutation
from llm.data.prepared import PreparedSplit, loss_mask, token_ids
from llm.data.split_rows import RowOrder, SplitRows

# B sequences of this host, T pairs each: tokens, targets, segment_ids (1, 2, … a piece, 0 padding)
# and positions (from 0 in each piece), int32 [B, T]; loss_weights, float32 [B, T], 0 on padding;
# cursor, uint32: rows consumed by all hosts once this batch is, what `seek` takes.
Batch = dict[str, np.ndarray]

# The cursor is a uint32 in the checkpoint.
MAX_CURSOR = 2**32 - 1


class PackedRows:
    """Random access to the endless sequence of packed rows of a mixture.

    With weights, source s gives its share of the rows and starts a new epoch of its own whenever
    it is used up. Without, one epoch is every row of every source once, in one common order; or,
    with `unique_rows`, so many of them, drawn once.
    """

    def __init__(
        self,
        splits: Mapping[str, PreparedSplit],
        weights: Mapping[str, float] | None,
        row_length: int,
        seed: int,
        unique_rows: int | None = None,
    ):
        self._mixture = None
        if weights is None:
            names = tuple(sorted(splits))
        else:
            _check_names(splits, weights)
            # Sorted: the order of a dict on the command line must not change the run.
            self._mixture = make_mixture({name: weights[name] for name in sorted(weights)})
            names = self._mixture.names
        self.row_length = row_length
        self._seed = seed
        self.of_source = {name: SplitRows(splits[name], row_length, seed) for name in names}
        for name, rows in self.of_source.items():
            if rows.num_rows == 0:
                raise ValueError(
                    f"source {name!r} has no text ({splits[name].path}); give it documents, "
                    "or set its weight to 0"
                )
        self._sources = list(self.of_source.values())
        self._num_rows = np.array([rows.num_rows for rows in self._sources])
        self._drawn = self._draw(unique_rows)
        self._orders = self._make_orders()

    def num_rows(self, num_epochs: int) -> int:
        """Return how many rows can be read before one is read for the num_epochs + 1st time."""
        if self._mixture is None:
            return self._rows_per_epoch * num_epochs
        return self._mixture.first_row_beyond(self._num_rows * num_epochs)

    def read(self, rows: Int[np.ndarray, " rows"], num_sequences: int) -> Batch:
        """Return the given global rows as arrays [num_sequences, row_length], the rest padding."""
        shape = (num_sequences, self.row_length)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "targets": np.zeros(shape, np.int32),
            "loss_weights": np.zeros(shape, np.float32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        source, plan_row = self._locate(np.asarray(rows, np.int64))
        for index in np.unique(source).tolist():
            of_source = np.flatnonzero(source == index)
            for mine, *where in self._sources[index].by_group(plan_row[of_source]):
                _fill_rows(batch, of_source[mine], *where)
        return batch

    def _locate(
        self, rows: Int[np.ndarray, " rows"]
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        """Return the source of each global row and which of that source's packed rows it is."""
        if self._mixture is None:
            epoch, place = np.divmod(rows, self._rows_per_epoch)
            union_row = self._orders[0].rows(epoch, place)
            if self._drawn is not None:
                union_row = self._drawn[union_row]
            ends = np.cumsum(self._num_rows)
            source = np.searchsorted(ends, union_row, side="right")
            return source, union_row - (ends - self._num_rows)[source]
        source, earlier = self._mixture.locate(rows)
        epoch, place = np.divmod(earlier, self._num_rows[source])
        plan_row = np.empty_like(rows)
        for index in np.unique(source).tolist():
            of_source = source == index
            plan_row[of_source] = self._orders[index].rows(epoch[of_source], place[of_source])
        return source, plan_row

    def _make_orders(self) -> list[RowOrder]:
        """Return the order of each source's rows, or the one of all sources' together."""
        if self._drawn is not None:
            return [RowOrder(np.array([len(self._drawn)]), self._seed)]
        groups = [rows.group_rows for rows in self._sources]
        if self._mixture is None:
            windowed = any(len(of_source) > 1 for of_source in groups)
            return [RowOrder(np.concatenate(groups), self._seed, windowed=windowed)]
        return [RowOrder(each, self._seed, windowed=len(each) > 1) for each in groups]

    @property
    def _rows_per_epoch(self) -> int:
        """Rows of an epoch of all sources in one order."""
        return self._orders[0].num_rows

    def _draw(self, unique_rows: int | None) -> np.ndarray | None:
        """Return the rows that are ever read, of all sources' one after the other; None: all."""
        if unique_rows is None:
            return None
        total = int(self._num_rows.sum())
        if self._mixture is not None:
            raise ValueError(
                "data.unique_rows draws from all sources together: leave out their weights"
            )
        if not 0 < unique_rows <= total:
            raise ValueError(f"data.unique_rows={unique_rows}: there are {total} rows")
        return permutation(total, "unique rows", self._seed)[:unique_rows]


def _fill_rows(
    batch: Batch, places: np.ndarray, split: PreparedSplit, plan: PackPlan, plan_rows: np.ndarray
) -> None:
    """Write rows `plan_rows` of the plan into rows `places` of the batch, all at once."""
    first = plan.row_offsets[plan_rows]
    pieces_in_row = plan.row_offsets[plan_rows + 1] - first
    piece = concatenated_ranges(first, pieces_in_row)
    length = plan.length[piece]
    segment = concatenated_ranges(np.ones_like(pieces_in_row), pieces_in_row)
    # Where each piece begins in the flat batch: its row, after the row's earlier pieces.
    ends = np.cumsum(length)
    first_piece = np.cumsum(pieces_in_row) - pieces_in_row
    before_row = (ends - length)[first_piece]
    row_start = np.repeat(places * plan.row_length - before_row, pieces_in_row)
    target_of = concatenated_ranges(row_start + ends - length, length)

    # One word more than the piece is long: the last input's target.
    words, offsets = split.read(plan.doc[piece], plan.start[piece], length + 1)
    source_of = concatenated_ranges(offsets, length)
    values = {
        "tokens": token_ids(words)[source_of],
        "targets": token_ids(words)[source_of + 1],
        "loss_weights": loss_mask(words)[source_of + 1],
        "segment_ids": np.repeat(segment, length),
        "positions": concatenated_ranges(np.zeros_like(length), length),
    }
    for name, value in values.items():
        batch[name].reshape(-1)[target_of] = value


class _HostBatches:
    """Random access to this host's slices of the global batches from one row on, for Grain."""

    def __init__(
        self,
        rows: PackedRows,
        first_row: int,
        end_row: int,
        batch_sequences: int,
        host_index: int,
        host_count: int,
    ):
        self._rows, self._first_row, self._end_row = rows, first_row, end_row
        self._batch_sequences = batch_sequences
        self._host_index, self._host_count = host_index, host_count

    def __len__(self) -> int:
        return max(0, -(-(self._end_row - self._first_row) // self._batch_sequences))

    def __getitem__(self, index: int) -> Batch:
        begin = self._first_row + index * self._batch_sequences
        local = self._batch_sequences // self._host_count
        mine = begin + self._host_index * local + np.arange(local)
        batch = self._rows.read(mine[mine < self._end_row], local)
        batch["cursor"] = np.uint32(min(begin + self._batch_sequences, self._end_row))
        return batch


class Batches(Iterator[Batch]):
    """An iterator over batches whose whole state is one integer, the cursor in each batch."""

    def __init__(
        self,
        rows: PackedRows,
        end_row: int,
        batch_sequences: int,
        host_index: int,
        host_count: int,
        num_workers: int,
        prefetch: int,
    ):
        self.rows = rows
        self._end_row = end_row
        self._slice = (batch_sequences, host_index, host_count)
        self._num_workers, self._prefetch = num_workers, prefetch
        self._first_row = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._make_dataset())
        return next(self._iterator)

    def seek(self, cursor: int) -> None:
        """Go on as if exactly `cursor` rows of the global sequence had been consumed."""
        if not 0 <= int(cursor) <= self._end_row:
            raise ValueError(f"cursor {cursor} lies outside the data, 0 to {self._end_row} rows")
        self.close()
        self._first_row = int(cursor)

    def close(self) -> None:
        """Stop prefetching. `next` would start again at the last `seek`."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _make_dataset(self) -> grain.IterDataset:
        source = _HostBatches(self.rows, self._first_row, self._end_row, *self._slice)
        # One element is one batch: rows are assembled a batch at a time, in a few array operations.
        options = grain.ReadOptions(
            num_threads=min(self._num_workers, self._prefetch), prefetch_buffer_size=self._prefetch
        )
        return grain.MapDataset.source(source).to_iter_dataset(options)


def make_batches(
    splits: Mapping[str, PreparedSplit],
    weights: Mapping[str, float] | None,
    row_length: int,
    global_batch_sequences: int,
    seed: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    num_workers: int = 2,
    prefetch: int = 4,
    cursor: int = 0,
    num_epochs: int | None = None,
    unique_rows: int | None = None,
) -> Batches:
    """Return the batches of a mixture, endless unless `num_epochs` is given.

    The global batches depend on splits, weights, row_length, seed and cursor alone; a host gets
    its consecutive slice of each, whatever the number of hosts or workers.

    Args:
      splits: prepared documents by source.
      weights: share of the rows each source gets; None: every document once an epoch.
      num_workers: threads that assemble batches (array operations, which run beside Python);
        0: `next` does.
      prefetch: batches made ahead.
      cursor: rows consumed before, by a run that goes on.
      num_epochs: stop before any row would be read more often; the last batch is padded with
        rows of zero loss weight.
      unique_rows: read so many of the rows only, drawn once; without weights.

    Raises:
      ValueError: the batch does not divide by the hosts, or a name, weight or cursor is wrong.
    """
    local_sequences(global_batch_sequences, host_index, host_count)
    rows = PackedRows(splits, weights, row_length, seed, unique_rows)
    end_row = MAX_CURSOR if num_epochs is None else min(MAX_CURSOR, rows.num_rows(num_epochs))
    batches = Batches(
        rows, end_row, global_batch_sequences, host_index, host_count, num_workers, prefetch
    )
    batches.seek(cursor)
    return batches


def local_sequences(global_batch_sequences: int, host_index: int, host_count: int) -> int:
    """Return how many sequences of each global batch a host takes.

    Raises:
      ValueError: the batch does not divide by the hosts, or there is no such host.
    """
    if global_batch_sequences < 1 or global_batch_sequences % host_count:
        near = max(1, round(global_batch_sequences / host_count)) * host_count
        raise ValueError(
            f"batch_sequences {global_batch_sequences} is not divisible by {host_count} hosts; "
            f"try {near}"
        )
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index {host_index} is not one of {host_count} hosts")
    return global_batch_sequences // host_count


def make_evaluation_batches(
    split: PreparedSplit,
    row_length: int,
    global_batch_sequences: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
) -> Batches:
    """Return one pass over a held-out split: every pair once, the same batches every time."""
    return make_batches(
        {"held-out": split}, None, row_length, global_batch_sequences, seed=0,
        host_index=host_index, host_count=host_count, num_epochs=1,
    )  # fmt: skip


def _check_names(splits: Mapping[str, PreparedSplit], weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if weight > 0 and name not in splits:
            raise ValueError(
                f"weight given for source {name!r}, which is not prepared; "
                f"prepared are {', '.join(sorted(splits))}"
            )
