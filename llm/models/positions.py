"""Where a token stands: sinusoids, rotary angles with scaling, ALiBi slopes. Models floor."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm.models.config import TransformerConfig


def sinusoidal_embedding(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Return sin and cos of positions at geometric wavelengths, sines in the even columns.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = positions[..., None] * jnp.asarray(frequencies, jnp.float32)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*positions.shape, -1)[..., :width]


def rotary_frequencies(config: TransformerConfig) -> np.ndarray:
    """Return the H/2 angular frequencies (radians a token), scaled as the config asks.

    Source: Su et al. 2021, arXiv:2104.09864. Linear scaling: Chen et al. 2023, arXiv:2306.15595.
    "llama3" keeps short wavelengths, divides long ones by the factor and blends between them, as in
    the Llama 3.1 release.
    """
    h = config.head_dim
    frequencies = config.rope_theta ** (-np.arange(0, h, 2, dtype=np.float64) / h)
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
        turns = config.rope_original_length_tokens * frequencies / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / config.rope_factor)
    return frequencies


def rotary_angles(
    positions: Int[Array, "B T"], config: TransformerConfig
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Return cos and sin of each position's H/2 angles, in float32."""
    # float32: at bf16 a position beyond 256 is already rounded to the wrong angle
    frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jax.lax.platform_dependent(angles, cpu=_cos_sin_apart, default=_cos_sin)


def _cos_sin(angles: Float[Array, "B T 1 h"]) -> tuple[jax.Array, jax.Array]:
    return jnp.cos(angles), jnp.sin(angles)


def _cos_sin_apart(angles: Float[Array, "B T 1 h"]) -> tuple[jax.Array, jax.Array]:
    """Return the same out of a loop, which XLA does not fuse into what reads it.

    On CPUs it would, and work them out again for every head of every layer: slow functions there.
    """
    pair = jax.lax.map(lambda i: jnp.where(i == 0, *_cos_sin(angles)), jnp.arange(2))
    return pair[0], pair[1]


def apply_rotary(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 h"], sin: Float[Array, "B T 1 h"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of each head: the half-split layout of Hugging Face's Llama."""
    dtype = jnp.promote_types(x.dtype, cos.dtype)  # float64 stays
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Return each head's slope: what it subtracts from a logit for every token of distance.

    Source: Press et al. 2021, arXiv:2108.12409, section 3. Head counts that are no power of two
    take the slopes of the next lower power and every other one of the next higher, as in its code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    finer = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)]
    return np.asarray(slopes + finer[0::2][: num_heads - power], np.float32)
