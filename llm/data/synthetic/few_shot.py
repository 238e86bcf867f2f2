"""Tasks on words that are told by examples alone. Data floor.

A row is "word → answer ," several times over, always by one function that is nowhere named, as in
Brown et al. 2020, arXiv:2005.14165, figure 1.1.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from llm.data.synthetic.batches import Sequences, Task

LETTERS = 26
ARROW, COMMA = LETTERS, LETTERS + 1
VOCAB_SIZE = LETTERS + 2

Words = Int[np.ndarray, "B W"]

FUNCTIONS: dict[str, Callable[[Words], Words]] = {
    "copy": lambda words: words,
    "reverse": lambda words: words[:, ::-1],
    "next letter": lambda words: (words + 1) % LETTERS,
    "third next letter": lambda words: (words + 3) % LETTERS,
    "rotate": lambda words: np.roll(words, -1, axis=1),
    "sort": lambda words: np.sort(words, axis=1),
    "first letter": lambda words: np.repeat(words[:, :1], words.shape[1], axis=1),
    "last letter": lambda words: np.repeat(words[:, -1:], words.shape[1], axis=1),
}


def few_shot_mixture(word_letters: int, examples: int) -> Task:
    """Return the task of rows with that many examples of one function each; answers count."""

    def task(generator: np.random.Generator, count: int) -> Sequences:
        function = generator.integers(0, len(FUNCTIONS), count)
        return few_shot_rows(generator, function, word_letters, examples)

    return task


def few_shot_rows(
    generator: np.random.Generator,
    function: Int[np.ndarray, " B"],
    word_letters: int,
    examples: int,
    *,
    last_only: bool = False,
) -> Sequences:
    """Return a row of examples of each of the given functions; all answers count, or the last."""
    count = len(function)
    words = generator.integers(0, LETTERS, (count, examples, word_letters))
    answers = np.empty_like(words)
    for index, apply in enumerate(FUNCTIONS.values()):
        rows = function == index
        flat = words[rows].reshape(-1, word_letters)
        answers[rows] = apply(flat).reshape(-1, examples, word_letters)
    sign = lambda token: np.full((count, examples, 1), token)  # noqa: E731
    parts = np.concatenate([words, sign(ARROW), answers, sign(COMMA)], axis=2)
    tokens = parts.reshape(count, -1)[:, :-1].astype(np.int32)  # nothing after the last answer
    counts = np.zeros(parts.shape, np.float32)
    counts[:, -1:, word_letters + 1 : -1] = 1.0
    if not last_only:
        counts[:, :, word_letters + 1 : -1] = 1.0
    return Sequences(tokens, counts.reshape(count, -1)[:, 1:-1])
