"""Rows sent over the mesh's expert axis to the devices of their experts, and back. Models floor.

To be called within shard_map. Each device may get everything: buffers are made for that. TPUs send
only what is in them (`ragged_all_to_all`), others the whole (`all_to_all`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.models.platforms import platform
from llm.parallel.rules import RULES

(_AXIS,) = RULES["experts"]
# (rows in any order, the local expert of each, how many each expert has) → outputs, row by row
FeedUnsorted = Callable[[Array, Array, Array], Array]


def exchange_rows(
    rows: Float[Array, "M D"],
    sizes: Int[Array, "X E"],
    feed: FeedUnsorted,
    *,
    most_per_token: int,
) -> Float[Array, "M D"]:
    """Return feed's outputs for this device's rows, computed where their experts are.

    Rows lie by device and then by its E experts, sizes[x, e] of each; those beyond go nowhere and
    give 0. No token has more than `most_per_token` rows.
    """
    received = jax.lax.all_to_all(sizes, _AXIS, 0, 0, tiled=True)
    # a token has at most one row for each expert of a device
    most = rows.shape[0] // most_per_token * min(most_per_token, sizes.shape[1])
    send = _ragged if platform() == "tpu" else _padded
    return send(rows, sizes, received, feed, most)


def _padded(rows: Array, sizes: Array, received: Array, feed: FeedUnsorted, most: int) -> Array:
    num_devices = sizes.shape[0]
    ends = jnp.cumsum(jnp.sum(sizes, axis=1))
    starts = ends - jnp.sum(sizes, axis=1)
    place = starts[:, None] + jnp.arange(most)  # [X most]: which row lies there
    buffer = jnp.where((place < ends[:, None])[..., None], rows.at[place].get(mode="clip"), 0)
    buffer = jax.lax.all_to_all(buffer, _AXIS, 0, 0, tiled=True)
    experts = _part(jnp.cumsum(received, axis=1)[:, None], jnp.arange(most))
    out = feed(buffer.reshape(-1, rows.shape[1]), experts.reshape(-1), jnp.sum(received, axis=0))
    out = jax.lax.all_to_all(out.reshape(num_devices, most, -1), _AXIS, 0, 0, tiled=True)
    index = jnp.arange(rows.shape[0])
    device = _part(ends, index)
    here = jnp.minimum(device, num_devices - 1)
    out = out[here, jnp.clip(index - starts[here], 0, most - 1)]
    return jnp.where((device < num_devices)[:, None], out, 0)


def _ragged(rows: Array, sizes: Array, received: Array, feed: FeedUnsorted, most: int) -> Array:
    num_devices, num_experts = sizes.shape
    sent, got = jnp.sum(sizes, axis=1), jnp.sum(received, axis=1)
    starts, got_starts = jnp.cumsum(sent) - sent, jnp.cumsum(got) - got
    theirs = jax.lax.all_to_all(got_starts, _AXIS, 0, 0, tiled=True)  # where mine begin over there
    empty = jnp.zeros_like(rows, shape=(num_devices * most, rows.shape[1]))
    buffer = jax.lax.ragged_all_to_all(rows, empty, starts, sent, theirs, got, axis_name=_AXIS)
    ends = jnp.cumsum(received.reshape(-1))  # by source, then by expert
    index = jnp.arange(buffer.shape[0])
    part = _part(ends, index)
    experts = jnp.where(index < ends[-1], part % num_experts, num_experts)
    out = feed(buffer, experts, jnp.sum(received, axis=0))
    back = jax.lax.all_to_all(starts, _AXIS, 0, 0, tiled=True)
    return jax.lax.ragged_all_to_all(
        out, jnp.zeros_like(rows), got_starts, got, back, sent, axis_name=_AXIS
    )


def _part(ends: Array, index: Array) -> Array:
    """Return in which part each index lies, of parts that end at `ends`; their number if in none.

    As `searchsorted`, which JAX 0.10 does not map by vmap within shard_map.
    """
    return jnp.sum(index[:, None] >= ends, axis=-1)
