"""Loops over tiles of tokens, so that few of their logits exist at once. First floor."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm.parallel.rules import ways_in_force

Tree = Any


def map_tiles(fn: Callable[..., Tree], tile_tokens: int, arrays: Sequence[Array]) -> Tree:
    """Return fn(*tiles of the arrays [B T ...]), whose results are [B T ...] too."""
    return sum_tiles(lambda *tiles: ((), fn(*tiles)), tile_tokens, arrays)[1]


def sum_tiles(
    fn: Callable[..., tuple[Tree, Tree]], tile_tokens: int, arrays: Sequence[Array]
) -> tuple[Tree, Tree]:
    """Return what fn(*tiles of the arrays [B T ...]) gives: its first tree summed over tiles, its
    second, of [B T ...], joined."""
    tiles = num_tiles(*arrays[0].shape[:2], tile_tokens)
    cut = tuple(_cut(x, tiles) for x in arrays)

    def body(total, tile):
        summed, stacked = fn(*tile)
        return jax.tree.map(jnp.add, total, summed), stacked

    shapes, _ = jax.eval_shape(fn, *(x[0] for x in cut))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    summed, stacked = jax.lax.scan(body, zero, cut)
    return summed, jax.tree.map(_join, stacked)


def num_tiles(batch: int, length: int, tile_tokens: int) -> int:
    """Return the least number of tiles, a divisor of the length, of at most tile_tokens a device of
    the mesh in force."""
    devices = ways_in_force("activation_batch") * ways_in_force("activation_length")
    return divide_tokens(batch * length / devices, length, tile_tokens)


def divide_tokens(tokens: float, length: int, tile_tokens: int) -> int:
    """Return the least divisor of the length that cuts a device's tokens into small enough tiles;
    the length itself where none does."""
    divisors = (n for n in range(1, length) if length % n == 0)
    return next((n for n in divisors if tokens <= n * tile_tokens), length)


def _cut(x: Array, tiles: int) -> Array:
    """[B T ...] → [tiles B T/tiles ...]; each tile takes every tiles-th position.

    Strided, so that a length that is split over devices stays split in every tile.
    """
    x = x.reshape(x.shape[0], x.shape[1] // tiles, tiles, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)


def _join(x: Array) -> Array:
    """The inverse of _cut."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
