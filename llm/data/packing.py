"""The pack plan: which pieces of which documents make up each row, decided before any sharding.
A pure function of document lengths, row length and seed; epochs only reorder its rows."""

import contextlib
import dataclasses
import functools
import hashlib
import warnings

import numpy as np
from etils import epath
from jaxtyping import Int, Int64

from llm.data.disk import load_arrays, save_arrays

# Part of every digest: raise it when the algorithm below changes what it returns.
ALGORITHM = "best-fit decreasing over groups of equal lengths, 1"
_ARRAYS = ("row_offsets", "doc", "start", "length")


@dataclasses.dataclass(frozen=True, eq=False)
class PackPlan:
    """Rows of pieces: row r holds the pieces row_offsets[r] to row_offsets[r + 1].

    A piece covers `length` (input, target) pairs of document `doc` from pair `start` on.
    """

    row_length: int
    seed: int
    row_offsets: Int64[np.ndarray, " offsets"]  # one more than rows
    doc: Int64[np.ndarray, " pieces"]
    start: Int64[np.ndarray, " pieces"]
    length: Int64[np.ndarray, " pieces"]

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_pairs(self) -> int:
        return int(self.length.sum())

    @property
    def fill_rate(self) -> float:
        """Share of all row positions that hold a pair; the rest is padding."""
        return self.num_pairs / max(1, self.num_rows * self.row_length)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the whole plan."""
        sha = hashlib.sha256(f"{self.row_length},{self.seed},{self.num_rows}".encode())
        for name in _ARRAYS:
            sha.update(np.ascontiguousarray(getattr(self, name), "<i8"))
        return sha.hexdigest()


def make_pack_plan(lengths: Int[np.ndarray, " documents"], row_length: int, seed: int) -> PackPlan:
    """Return the plan that covers every pair of every document exactly once.

    Documents longer than a row become consecutive pieces. Pieces are packed by best-fit
    decreasing; the seed decides which of several pieces of one length goes where. The
    composition, and so the number of rows, is the same in every epoch: the place of any row of
    any epoch is then known without summing over the epochs before it.

    Args:
      lengths: (input, target) pairs of each document: stored tokens − 1.
      row_length: pairs in a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}; it must be at least 1 token")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError("lengths must be a vector of numbers ≥ 0, the pairs of each document")
    num_pieces = -(-lengths // row_length)
    doc = np.repeat(np.arange(len(lengths)), num_pieces)
    start = concatenated_ranges(np.zeros_like(num_pieces), num_pieces) * row_length
    length = np.minimum(row_length, lengths[doc] - start)
    row, num_rows = _best_fit_decreasing(length, row_length, seed)
    by_row = np.argsort(row, kind="stable")
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=num_rows), out=offsets[1:])
    return PackPlan(row_length, seed, offsets, doc[by_row], start[by_row], length[by_row])


def load_pack_plan(
    lengths: Int[np.ndarray, " documents"],
    row_length: int,
    seed: int,
    cache_dir: epath.PathLike,
) -> PackPlan:
    """Return `make_pack_plan(...)`, kept in `cache_dir` under a digest of its arguments.

    A damaged cache file is named in a warning, then replaced.
    """
    sha = hashlib.sha256(f"{ALGORITHM},{row_length},{seed}".encode())
    sha.update(np.ascontiguousarray(lengths, "<i8"))
    path = epath.Path(cache_dir) / f"plan-{sha.hexdigest()[:32]}.npz"
    if path.exists():
        try:
            return _read_plan(path, lengths, row_length, seed)
        except Exception as error:  # NumPy and zipfile raise a dozen kinds on what is damaged
            warnings.warn(f"pack plan {path} is damaged ({error}); making it again", stacklevel=2)
    plan = make_pack_plan(lengths, row_length, seed)
    arrays = {name: getattr(plan, name) for name in _ARRAYS}
    # Where the directory is read-only the plan is made anew at each start: seconds.
    with contextlib.suppress(OSError):
        save_arrays(path, {"digest": np.array(plan.digest), **arrays})
    return plan


def _read_plan(
    path: epath.Path, lengths: Int[np.ndarray, " documents"], row_length: int, seed: int
) -> PackPlan:
    arrays = load_arrays(path, ("digest", *_ARRAYS))
    digest = str(arrays.pop("digest"))
    plan = PackPlan(row_length, seed, **arrays)
    if plan.digest != digest:
        raise ValueError(f"its digest is {plan.digest[:12]}, recorded was {digest[:12]}")
    # Whoever wrote it could write its digest: nothing in it may lead outside of the documents.
    pieces = np.diff(plan.row_offsets, prepend=0, append=len(plan.doc))
    if (
        min(plan.doc.min(initial=0), plan.start.min(initial=0), pieces.min(initial=0)) < 0
        or (plan.start + plan.length > lengths[plan.doc]).any()
    ):
        raise ValueError("it names pieces of documents that are not there")
    return plan


def _best_fit_decreasing(
    length: Int64[np.ndarray, " pieces"], row_length: int, seed: int
) -> tuple[Int64[np.ndarray, " pieces"], int]:
    """Return each piece's row, and the number of rows.

    Each piece, longest first, goes into the fullest row it fits in, else into a new one. All
    pieces of one length are placed together: the fullest row that takes one takes as many as fit
    (after the first it is the fullest still), so rows of equal room are filled in one slice.
    """
    shuffled = permutation(len(length), "pieces", seed)
    order = shuffled[np.argsort(-length[shuffled], kind="stable")]
    row = np.empty(len(length), np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}  # room left -> rows with exactly that room
    rooms = 0  # bit r is set while open_rows[r] holds rows: finds the least room ≥ a length

    def put_back(room: int, rows: np.ndarray) -> None:
        nonlocal rooms
        if room and len(rows):
            open_rows.setdefault(room, []).append(rows)
            rooms |= 1 << room

    num_rows = 0
    sizes, firsts, counts = np.unique(-length[order], return_index=True, return_counts=True)
    for size, first, count in zip(-sizes, firsts, counts, strict=True):
        size, pieces = int(size), order[first : first + count]
        while len(pieces):
            fitting = rooms >> size
            if not fitting:
                needed = -(-len(pieces) // (row_length // size))
                put_back(row_length, np.arange(num_rows, num_rows + needed))
                num_rows += needed
                continue
            room = size + (fitting & -fitting).bit_length() - 1
            rows = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            each = room // size
            filled = min(len(rows), len(pieces) // each)
            row[pieces[: filled * each]] = np.repeat(rows[:filled], each)
            put_back(room - each * size, rows[:filled])
            pieces, rows = pieces[filled * each :], rows[filled:]
            if len(rows) and len(pieces):  # fewer than `each` are left: one row takes them all
                row[pieces] = rows[0]
                put_back(room - len(pieces) * size, rows[:1])
                pieces, rows = pieces[:0], rows[1:]
            put_back(room, rows)
    return row, num_rows


def permutation(size: int, *key: str | int) -> Int64[np.ndarray, " size"]:
    """Return a random order of range(size) that depends on `key` alone.

    It sorts raw Philox words: numpy fixes that stream for good, unlike `Generator.permutation`.
    """
    philox_key = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=philox_key).random_raw(size), kind="stable")


def concatenated_ranges(
    starts: Int[np.ndarray, " ranges"], counts: Int[np.ndarray, " ranges"]
) -> Int64[np.ndarray, " total"]:
    """Return arange(starts[0], starts[0] + counts[0]), then those of starts[1], and so on."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
