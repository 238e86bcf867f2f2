"""Random tokens that come again: what an induction head is for. Data floor.

Source: Olsson et al. 2022, "In-context learning and induction heads", transformer-circuits.pub,
section "Argument 1"; here the repetition itself is what is learnt, in place of text.
"""

import numpy as np

from llm.data.synthetic.batches import Sequences, Task


def repeated_segments(vocab_size: int, length_tokens: int, *, shortest: int) -> Task:
    """Return the task of rows that repeat one random segment, of a length drawn from `shortest` to
    half of the row: what follows can be told from what followed before, and from nothing else."""

    def task(generator: np.random.Generator, count: int) -> Sequences:
        segment = generator.integers(0, vocab_size, (count, length_tokens + 1))
        lengths = generator.integers(shortest, length_tokens // 2 + 1, (count, 1))
        index = np.arange(length_tokens + 1)[None] % lengths
        tokens = np.take_along_axis(segment, index, axis=1).astype(np.int32)
        return Sequences(tokens, np.ones((count, length_tokens), np.float32))

    return task


def repeated_twice(
    generator: np.random.Generator, vocab_size: int, segment_tokens: int, count: int
) -> Sequences:
    """Return rows of a random segment and the same once more; of the second, all but the first
    token count."""
    segment = generator.integers(0, vocab_size, (count, segment_tokens))
    tokens = np.concatenate([segment, segment], axis=1).astype(np.int32)
    weights = np.zeros((count, 2 * segment_tokens - 1), np.float32)
    weights[:, segment_tokens:] = 1.0
    return Sequences(tokens, weights)
