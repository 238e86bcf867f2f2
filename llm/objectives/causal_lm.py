"""The causal language-model loss over a packed batch. First floor."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.objectives.cross_entropy import Sums, tiled_cross_entropy

Batch = dict[str, Array]


def causal_lm_loss(
    unembed: Callable[[dict, Float[Array, "B T D"]], Float[Array, "B T V"]],
    head: dict,
    hidden: Float[Array, "B T D"],
    batch: Batch,
    *,
    z_loss: float = 0.0,
    tile_tokens: int = 4096,
) -> tuple[Float[Array, ""], Sums]:
    """Return the objective, summed over targets in nats, and sums: loss, z_loss, correct, tokens.

    `unembed(head, hidden)` gives the logits of the last hidden states. Divide by `tokens`, the sum
    of the batch's `loss_weights`.
    """
    weights = batch["loss_weights"]
    objective, sums = tiled_cross_entropy(
        unembed, tile_tokens, z_loss, head, hidden, batch["targets"], weights
    )
    return objective, sums | {"tokens": jnp.sum(weights)}
