"""Multitask sparse parity: many skills, some often needed and some seldom. Data floor.

Source: Michaud et al. 2023, arXiv:2303.13506, section 3: n_tasks subtasks, each the parity of its
own k of n bits; a row names its subtask, drawn with probability ∝ i^−(α+1), and gives random bits.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32


class ParityRows(NamedTuple):
    """Which subtask a row is of, its bits, and their parity."""

    subtask: Int32[np.ndarray, " B"]
    bits: Float32[np.ndarray, "B N"]
    parity: Int32[np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class SparseParity:
    """The subtasks of one seed."""

    num_subtasks: int
    num_bits: int
    subset_bits: int  # k, the bits that count for a subtask
    alpha: float
    seed: int

    @functools.cached_property
    def frequencies(self) -> Float64[np.ndarray, " tasks"]:
        """How often each subtask is drawn; the first most."""
        weights = np.arange(1, self.num_subtasks + 1) ** -(self.alpha + 1.0)
        return weights / weights.sum()

    @functools.cached_property
    def subsets(self) -> Int32[np.ndarray, "tasks k"]:
        """The bits that count, of each subtask: different sets."""
        generator = np.random.default_rng([self.seed, 0])
        found: dict[tuple[int, ...], None] = {}
        while len(found) < self.num_subtasks:
            drawn = generator.choice(self.num_bits, self.subset_bits, replace=False)
            found[tuple(sorted(drawn.tolist()))] = None
        return np.array(list(found), np.int32)

    def __post_init__(self):
        if self.num_subtasks > math.comb(self.num_bits, self.subset_bits):
            raise ValueError(
                f"there are only {math.comb(self.num_bits, self.subset_bits)} sets of "
                f"{self.subset_bits} of {self.num_bits} bits, for {self.num_subtasks} subtasks"
            )

    def rows(self, generator: np.random.Generator, count: int) -> ParityRows:
        """Return rows of subtasks drawn by their frequencies."""
        return self.rows_of(
            generator, generator.choice(self.num_subtasks, count, p=self.frequencies)
        )

    def rows_of(self, generator: np.random.Generator, subtask: np.ndarray) -> ParityRows:
        """Return a row of each of the given subtasks."""
        bits = generator.integers(0, 2, (len(subtask), self.num_bits))
        chosen = np.take_along_axis(bits, self.subsets[subtask], axis=1)
        return ParityRows(
            subtask.astype(np.int32),
            bits.astype(np.float32),
            (chosen.sum(axis=1) % 2).astype(np.int32),
        )
