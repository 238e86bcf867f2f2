"""From logits to the next token: penalty, temperature, filters, draw. Generation floor.

Pure functions of logits and uniform random numbers; every row of a batch is treated by itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llm.generation.config import SamplingConfig

Logits = Float[Array, "B V"]

BLOCK_TOKENS = 128


def repetition_penalty(logits: Logits, seen: Bool[Array, "B V"], penalty: float) -> Logits:
    """Return logits, those of seen tokens divided by the penalty if positive, else multiplied.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1. The paper divides negative
    logits too, which makes them likelier; as `transformers` does, they are multiplied here.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Return logits with all but the k likeliest at −inf; tokens as likely as the k-th stay too."""
    return _keep_heaviest(logits, jnp.ones_like(logits, jnp.float32), min(k, logits.shape[-1]))


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Return logits with all but the likeliest tokens that together reach probability p at −inf.

    Where it differs from `transformers`: of several tokens equally likely at the border all stay,
    so that the result does not hang on the order of a sort.

    Source: Holtzman et al. 2020 (nucleus sampling), arXiv:1904.09751, section 3.1.
    """
    return _keep_heaviest(logits, jax.nn.softmax(logits.astype(jnp.float32)), p)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Return logits with tokens less than p times as likely as the likeliest at −inf.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    probabilities = jax.nn.softmax(logits)
    least = p * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)


def sampling_logits(
    logits: Logits, config: SamplingConfig, seen: Bool[Array, "B V"] | None = None
) -> Logits:
    """Return the logits that the next token is drawn by.

    In `transformers`' order: repetition penalty, temperature, top-k, top-p, min-p; each works on
    what the ones before it left. Temperature 0 is for the maximum, which no filter takes away.
    """
    if config.repetition_penalty != 1.0:
        logits = repetition_penalty(logits, seen, config.repetition_penalty)
    if config.temperature == 0.0:
        return logits
    if config.temperature != 1.0:
        logits = logits / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1.0:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def uniform_pairs(keys: Key[Array, " B"], num_tokens: int) -> Float[Array, "B M 2"]:
    """Return the numbers in [0, 1) that each row's tokens are drawn by: of its own key alone.

    All at once: a generator that runs in the loop over tokens costs as much as the draws.
    """
    return jax.vmap(lambda key: jax.random.uniform(key, (num_tokens, 2), jnp.float32))(keys)


def sample(
    logits: Logits,
    uniform: Float[Array, "B 2"],
    config: SamplingConfig,
    seen: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Return one token a row, drawn by the config's logits (the likeliest at temperature 0), and
    its log softmax(logits / temperature), in nats, before penalty and filters.

    The second is what a trainer that divides its logits by the temperature computes for the same
    token; temperature 0 counts as 1. Row b depends on its own logits, numbers in [0, 1) and seen
    tokens alone.
    """
    kept = sampling_logits(logits, config, seen)
    if config.temperature == 0.0:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    else:
        tokens, log_z = jax.vmap(_draw)(uniform, kept)
    if config.temperature not in (0.0, 1.0):
        logits = logits / config.temperature
    if not config.is_plain:  # or the draw has added up the very same exponentials
        log_z = jax.nn.logsumexp(logits, axis=-1)
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_z


def _draw(
    uniform: Float[Array, " 2"], logits: Float[Array, " V"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Return a token from softmax(logits), drawn as its block of the vocabulary and then out of
    that, and the logsumexp of the logits.

    One draw over all tokens would need sums over the whole vocabulary in order, or a random number
    for each of them. Probabilities are those of the logits to the numbers' 2⁻²³.
    """
    padding = -logits.shape[0] % BLOCK_TOKENS
    blocks = jnp.pad(logits, (0, padding), constant_values=-jnp.inf).reshape(-1, BLOCK_TOKENS)
    totals = jax.nn.logsumexp(blocks, axis=-1)
    block = _invert(uniform[0], totals)
    return block * BLOCK_TOKENS + _invert(uniform[1], blocks[block]), jax.nn.logsumexp(totals)


def _invert(uniform: Float[Array, ""], logits: Float[Array, " N"]) -> Int[Array, ""]:
    """Return the first place up to which softmax(logits) adds up to more than a number in [0, 1).

    Never one of probability 0, at which the sum does not rise.
    """
    heights = jnp.cumsum(jnp.exp((logits - jnp.max(logits)).astype(jnp.float32)))
    return jnp.sum(heights <= uniform * heights[-1], dtype=jnp.int32)


def _keep_heaviest(logits: Logits, weights: Float[Array, "B V"], target: float) -> Logits:
    """Return logits at or above the highest threshold at which the kept weights reach the target.

    The threshold is found bit by bit: 32 sums over the row, which cost less than one sort.
    """
    order = _ordered_bits(logits)

    def try_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        kept = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(kept >= target, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def _ordered_bits(x: Logits) -> jax.Array:
    """Return integers in the same order as the floats."""
    x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)  # −0.0 and 0.0 are one value
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # a set sign bit means that larger patterns are smaller numbers
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
