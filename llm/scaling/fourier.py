"""The Fourier spectrum of an embedding over a cyclic group. Third floor.

Source: Nanda et al. 2023, arXiv:2301.05217, section 4.1 and figure 3.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def fourier_power(embedding: Float[ArrayLike, "p D"]) -> Float[Array, " K"]:
    """Return the share of the embedding's variance over numbers 0 … p − 1 at each frequency
    1 … (p − 1)/2, cosine and sine together. They add up to 1; p is odd."""
    centred = embedding - jnp.mean(embedding, axis=0)
    spectrum = jnp.abs(jnp.fft.rfft(centred, axis=0)) ** 2
    power = spectrum.sum(axis=1)[1:]
    return power / power.sum()


def key_frequencies(power: Float[ArrayLike, " K"], share: float = 0.9) -> list[int]:
    """Return the fewest frequencies that hold that share of the variance, strongest first."""
    power = np.asarray(power)
    order = np.argsort(power)[::-1]
    count = int(np.searchsorted(np.cumsum(power[order]), share)) + 1
    return [int(k) + 1 for k in order[:count]]
