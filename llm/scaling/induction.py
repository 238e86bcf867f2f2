"""What tells an induction head: its attention. Third floor.

Source: Olsson et al. 2022, "In-context Learning and Induction Heads", transformer-circuits.pub.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.models.transformer import Transformer
from llm.models.unstack import unstack, unstacked


def attention_weights(
    model: Transformer, params: dict, tokens: Int[Array, "B T"]
) -> Float[Array, "L B N T S"]:
    """Return the attention of every head from each token to each, for causal global attention."""
    flat, config = unstacked(model), model.config
    _, probes = flat.apply({"params": unstack(model, params)}, tokens, mutable=["probes"])
    length = tokens.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    layers = []
    for i in range(config.num_layers):
        seen = probes["probes"][f"prefix_{i}"]["attention"]
        query, key = seen["seen_query"][0], seen["seen_key"][0]
        key = jnp.repeat(key, config.num_heads // config.num_kv_heads, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / config.head_dim**0.5
        layers.append(jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1))
    return jnp.stack(layers)


def prefix_matching_scores(
    weights: Float[Array, "L B N T S"], segment_tokens: int
) -> Float[Array, "L N"]:
    """Return each head's mean attention, from tokens of a segment's second occurrence, to the token
    after the same one in the first: rows of one random segment twice (`repeated_twice`).

    1 is a perfect induction head; attention spread evenly gives about 1/T.
    """
    queries = jnp.arange(segment_tokens, weights.shape[3])
    keys = queries - segment_tokens + 1
    return jnp.mean(weights[:, :, :, queries, keys], axis=(1, 3))
