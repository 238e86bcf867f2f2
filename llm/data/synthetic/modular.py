"""Addition modulo a prime, all pairs, split into training and held-out ones. Data floor.

Source: Power et al. 2022, arXiv:2201.02177; the layout "a b =" is Nanda et al. 2023,
arXiv:2301.05217, section 3.
"""

import numpy as np
from jaxtyping import Int

from llm.data.synthetic.batches import Sequences


def modular_addition(modulus: int, train_fraction: float, seed: int) -> tuple[Sequences, Sequences]:
    """Return training and held-out sequences "a b = c": numbers are their own tokens, "=" is token
    `modulus`, and c alone counts.

    A random `train_fraction` of the pairs is trained on, as in the papers; held out are those of
    which neither order is. (The papers hold out all the others, and a model that has only seen that
    addition commutes is right on as many of them as it was trained on.) How many of each there are
    does not depend on the seed.

    Raises:
      ValueError: one of the two would be empty.
    """
    random = np.random.default_rng(seed)
    unequal = random.permutation(np.argwhere(np.triu(np.ones((modulus, modulus)), k=1)))
    unequal = random.permuted(unequal, axis=1)  # either order first
    equal = random.permutation(np.repeat(np.arange(modulus)[:, None], 2, axis=1))
    missed = 1 - train_fraction
    cut, cut_equal = round(missed**2 * len(unequal)), round(missed * modulus)
    held_out = [unequal[:cut], unequal[:cut, ::-1], equal[:cut_equal]]
    seen, seen_equal = unequal[cut:], equal[cut_equal:]
    in_both_orders = max(0, round(train_fraction * modulus**2) - len(seen) - len(seen_equal))
    train = [seen, seen[:in_both_orders, ::-1], seen_equal]
    if not 0 < train_fraction < 1 or not cut or not len(seen):
        raise ValueError(
            f"train_fraction={train_fraction} of {modulus**2} pairs leaves nothing to train on or "
            "to hold out"
        )
    return _sequences(np.concatenate(train), modulus), _sequences(np.concatenate(held_out), modulus)


def _sequences(pairs: Int[np.ndarray, "R 2"], modulus: int) -> Sequences:
    equals = np.full((len(pairs), 1), modulus)
    sums = pairs.sum(axis=1, keepdims=True) % modulus
    tokens = np.concatenate([pairs, equals, sums], axis=1).astype(np.int32)
    return Sequences(tokens, np.tile(np.array([0, 0, 1], np.float32), (len(pairs), 1)))
