"""Addition of numbers of several digits as text, the sum plain or reversed. Data floor.

Source: Lee et al. 2023, arXiv:2307.03381, section 3: "128+367=495" is plain, "128+367=594"
reversed, so that each digit of the sum depends on digits and a carry already seen.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int, Int32

from llm.data.synthetic.batches import Sequences, Task

DIGITS = 10
PLUS, EQUALS = DIGITS, DIGITS + 1
VOCAB_SIZE = 12


def addition_sequences(
    left: Int[np.ndarray, " B"],
    right: Int[np.ndarray, " B"],
    digits: int,
    order: Literal["plain", "reversed"],
) -> Sequences:
    """Return "left+right=sum" with numbers of that many digits, zeros in front, and a sum of one
    more; the sum alone counts.

    Raises:
      ValueError: a number has more digits.
    """
    if max(left.max(), right.max()) >= 10**digits or min(left.min(), right.min()) < 0:
        raise ValueError(f"numbers must be in 0 to {10**digits - 1}")
    total = _spelt(left + right, digits + 1)
    if order == "reversed":
        total = total[:, ::-1]
    sign = lambda token: np.full((len(left), 1), token, np.int32)  # noqa: E731
    parts = [_spelt(left, digits), sign(PLUS), _spelt(right, digits), sign(EQUALS), total]
    tokens = np.concatenate(parts, axis=1)
    weights = np.zeros((len(left), tokens.shape[1] - 1), np.float32)
    weights[:, -(digits + 1) :] = 1.0
    return Sequences(tokens, weights)


def addition_split(
    digits: int,
    order: Literal["plain", "reversed"],
    *,
    num_train: int,
    num_held_out: int,
    seed: int,
) -> tuple[Sequences, Sequences]:
    """Return so many different training and held-out problems, drawn uniformly from all pairs.

    Raises:
      ValueError: there are not that many pairs.
    """
    wanted, available = num_train + num_held_out, 10 ** (2 * digits)
    if wanted > available:
        raise ValueError(f"there are {available} pairs of {digits} digits, {wanted} are asked for")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(available, wanted, replace=False)
    sequences = addition_sequences(*np.divmod(chosen, 10**digits), digits, order)
    return (
        Sequences(sequences.tokens[:num_train], sequences.weights[:num_train]),
        Sequences(sequences.tokens[num_train:], sequences.weights[num_train:]),
    )


def drawn_from(sequences: Sequences) -> Task:
    """Return the task that draws rows, with replacement, of given sequences."""

    def task(generator: np.random.Generator, count: int) -> Sequences:
        rows = generator.integers(0, len(sequences.tokens), count)
        return Sequences(sequences.tokens[rows], sequences.weights[rows])

    return task


def _spelt(numbers: Int[np.ndarray, " B"], digits: int) -> Int32[np.ndarray, "B N"]:
    powers = 10 ** np.arange(digits)[::-1]
    return (numbers[:, None] // powers % 10).astype(np.int32)
