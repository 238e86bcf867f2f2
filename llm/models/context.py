"""Context parallelism: rows split over devices meet in attention, by all-to-all. Models floor.

Everywhere else a device holds a stretch of every row and all its heads; in attention it holds whole
rows and a part of the heads, so that any kernel and any mask does there what it does on one device,
and causal masks load every device alike. Source: Jacobs et al. 2023, arXiv:2309.14509 ("Ulysses").
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.models.on_mesh import check_heads
from llm.parallel.rules import constrain, ways_in_force

_QUERY_AXES = ("activation_batch", None, "activation_whole_row_heads", "activation_head_dim")
_KEY_AXES = ("activation_batch", "activation_whole_row_heads", None, "activation_head_dim")


def whole_rows(
    query: Float[Array, "B T N H"], key: Float[Array, "B K S H"], value: Float[Array, "B K S H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B k S H"], Float[Array, "B k S H"]]:
    """Return them with whole rows on each device, for fewer heads. Without a split, as they are.

    Key-value heads fewer than the devices that share them are repeated until each has its own.

    Raises:
      ValueError: the devices cannot share the query heads evenly.
    """
    stretches, devices = (
        ways_in_force("activation_length"),
        ways_in_force("activation_whole_row_heads"),
    )
    length, num_heads, num_kv = query.shape[1], query.shape[2], key.shape[1]
    if stretches == 1 or length != key.shape[2] or length % stretches:
        return query, key, value  # one token that is decoded is not split
    check_heads(num_heads, devices, stretches)
    repeats = num_repeats(num_kv, devices)
    # First as they are: else the compiler gathers what they are made of, and makes them whole.
    query = constrain(query, "activation_batch", "activation_length", "activation_heads", None)
    split = "activation_batch", "activation_kv_heads", "activation_length", None
    key, value = constrain(key, *split), constrain(value, *split)
    key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    return constrain(query, *_QUERY_AXES), constrain(key, *_KEY_AXES), constrain(value, *_KEY_AXES)


def num_repeats(num_kv_heads: int, devices: int) -> int:
    """Return how often key-value heads are repeated for so many devices to share them."""
    return devices // math.gcd(devices, num_kv_heads)
