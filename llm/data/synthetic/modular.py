"""Addition modulo a prime, all pairs, split into training and held-out ones. Data floor.

Source: Power et al. 2022, arXiv:2201.02177; the layout "a b =" is Nanda et al. 2023,
arXiv:2301.05217, section 3.
"""

import numpy as np

from llm.data.synthetic.batches import Sequences


def modular_addition(modulus: int, train_fraction: float, seed: int) -> tuple[Sequences, Sequences]:
    """Return all training and all held-out sequences "a b = c": numbers are their own tokens, "="
    is token `modulus`, and c alone counts.

    Both orders of a pair are on one side. In the papers they are apart, and a model that only sees
    that addition commutes is right on `train_fraction` of the held-out pairs.

    Raises:
      ValueError: one of the two would be empty.
    """
    pairs = np.stack(np.divmod(np.arange(modulus**2), modulus), axis=1)
    key = np.random.default_rng(seed).random((modulus, modulus))
    key = np.minimum(key, key.T)[pairs[:, 0], pairs[:, 1]]  # the same for both orders
    pairs = pairs[np.argsort(key, kind="stable")]
    equals = np.full((len(pairs), 1), modulus)
    sums = pairs.sum(axis=1, keepdims=True) % modulus
    tokens = np.concatenate([pairs, equals, sums], axis=1).astype(np.int32)
    weights = np.tile(np.array([0, 0, 1], np.float32), (len(pairs), 1))
    cut = round(train_fraction * len(pairs))
    if 0 < cut < len(pairs) and sorted(pairs[cut]) == sorted(pairs[cut - 1]):
        cut += 1
    if not 0 < cut < len(pairs):
        raise ValueError(
            f"train_fraction={train_fraction} of {len(pairs)} pairs leaves nothing to train on or "
            "to hold out"
        )
    return Sequences(tokens[:cut], weights[:cut]), Sequences(tokens[cut:], weights[cut:])
