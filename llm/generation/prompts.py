"""Prompts of unequal length as one batch, and a key for each. Generation floor."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key


def bucket_length(length_tokens: int) -> int:
    """Return the padded length of a prompt: few different ones, so that little is compiled."""
    if length_tokens <= 256:
        return max(16, 1 << (length_tokens - 1).bit_length())
    return -(-length_tokens // 256) * 256


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int = 0
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
    """Return prompts padded on the left to a bucketed length, and their true lengths.

    Raises:
      ValueError: there is no prompt, or one has no tokens.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(
            f"prompts of {lengths.tolist()} tokens: each needs at least one; begin with BOS"
        )
    rows = np.full((len(prompts), bucket_length(int(lengths.max()))), pad_id, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[-len(prompt) :] = prompt
    return rows, lengths


def sequence_keys(key: Key[Array, ""], count: int) -> Key[Array, " B"]:
    """Return a key for each of `count` sequences; the i-th is the same whatever the count."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
