"""Endless batches of made-up sequences, each a function of a seed and of how many were read.

Data floor. A task is a function (random generator, count) → `Sequences`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

Batch = dict[str, np.ndarray]


class Sequences(NamedTuple):
    """Rows of T + 1 tokens, and which of the last T are to be learnt or scored."""

    tokens: Int32[np.ndarray, "B T+1"]
    weights: Float32[np.ndarray, "B T"]


Task = Callable[[np.random.Generator, int], Sequences]


def as_batch(sequences: Sequences) -> Batch:
    """Return the arrays that the train step takes: each row one segment."""
    tokens, shape = sequences.tokens, sequences.weights.shape
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": sequences.weights,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }


class TaskBatches(Iterator[Batch]):
    """Batches [R B …] of several tasks side by side, one for each member of a group of runs.

    Batch n of a member depends on its task, its seed and n alone.
    """

    def __init__(self, tasks: Sequence[Task], seeds: Sequence[int], batch_sequences: int):
        self._tasks, self._seeds = list(tasks), list(seeds)
        self._batch_sequences = batch_sequences
        self._cursor = 0

    def __next__(self) -> Batch:
        index = self._cursor // self._batch_sequences
        rows = [
            as_batch(task(np.random.default_rng([seed, index]), self._batch_sequences))
            for task, seed in zip(self._tasks, self._seeds, strict=True)
        ]
        self._cursor += self._batch_sequences
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return arrays | {"cursor": np.uint32(self._cursor)}

    def seek(self, cursor: int) -> None:
        """Go on as if so many sequences of each member had been read."""
        if cursor % self._batch_sequences:
            raise ValueError(
                f"cursor {cursor} is not a multiple of batches of {self._batch_sequences}"
            )
        self._cursor = int(cursor)

    def close(self) -> None:
        """Nothing is open."""
