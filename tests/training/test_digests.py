"""Checksums: against NumPy's arithmetic, on every layout, and sensitive to every bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm.training.digests import array_digests, combine_digests, named_leaves, tree_digest


def digest(x) -> str:
    return array_digests({"x": x})["x"]


def reference(words: np.ndarray) -> str:
    """The two sums in Python integers, which do not wrap by themselves."""
    mask, first, second = 2**32 - 1, 0, 0
    for index, bits in enumerate(int(w) for w in words.reshape(-1)):
        word = bits ^ (index * 0x9E3779B1 & mask)
        word = (word ^ word >> 16) * 0x85EBCA6B & mask
        word = (word ^ word >> 13) * 0xC2B2AE35 & mask
        word ^= word >> 16
        first, second = first + word & mask, second + (word ^ word >> 15) * word & mask
    return f"{first:08x}{second:08x}"


VALUES = np.random.default_rng(0).normal(size=(3, 5, 4))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (np.float32, lambda x: x.view(np.uint32)),
        (np.int32, lambda x: x.view(np.uint32)),
        (ml_dtypes.bfloat16, lambda x: x.view(np.uint16)),
        (np.float16, lambda x: x.view(np.uint16)),
        (ml_dtypes.float8_e4m3fn, lambda x: x.view(np.uint8)),
        (np.int8, lambda x: x.view(np.uint8)),
        (np.bool_, lambda x: x.view(np.uint8)),
        (np.float64, lambda x: x.view(np.uint32)),  # little-endian: low word first
    ],
)
def test_equals_python_integers(dtype, words):
    x = VALUES.astype(dtype)
    assert digest(x) == reference(words(x))
    if x.dtype.itemsize < 8:
        assert digest(jnp.asarray(x)) == reference(words(x))


def test_64_bit_arrays_give_the_same_in_64_bit_mode():
    with jax.enable_x64(True):
        assert digest(jnp.asarray(VALUES)) == reference(VALUES.view(np.uint32))


def test_known_value():
    # MurmurHash3's finaliser of 1 is 0x514e28b7; shifted right by 15 bits it is 0xa29c.
    assert digest(np.zeros((), np.float32)) == "0000000000000000"
    assert digest(np.ones((2,), np.float32)) == reference(np.ones(2, np.float32).view(np.uint32))
    assert digest(np.array([1], np.uint32)) == "514e28b7" + f"{0x514E8A2B * 0x514E28B7 % 2**32:08x}"


@pytest.mark.parametrize(
    "spec", [(), ("a",), (None, "b"), ("a", "b"), (("a", "b"), None), (None, ("b", "a"))]
)
def test_same_on_every_mesh(spec):
    x = np.random.default_rng(1).normal(size=(16, 8, 3)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digest(placed) == reference(x.view(np.uint32))


def test_every_bit_and_every_place_counts():
    x = np.arange(6, dtype=np.float32)
    seen = {digest(x), digest(x[::-1].copy()), digest(x[[1, 0, 2, 3, 4, 5]])}
    for element in range(6):
        for bit in range(32):
            flipped = x.view(np.uint32).copy()
            flipped[element] ^= np.uint32(1 << bit)
            seen.add(digest(flipped.view(np.float32)))
    assert len(seen) == 3 + 6 * 32
    assert digest(np.array([-0.0], np.float32)) != digest(np.array([0.0], np.float32))


def test_names_are_paths():
    tree = {"b": [jnp.ones(1), {"c": jnp.ones(2)}], "a": None}
    assert list(named_leaves(tree)) == ["b/0", "b/1/c"]
    with pytest.raises(ValueError, match="'a/b'"):
        named_leaves({"a": {"b": 1}, "a/b": 2})


def test_tree_digest_depends_on_names_not_order():
    x, y = jnp.ones(3), jnp.zeros(3)
    assert tree_digest({"a": x, "b": y}) != tree_digest({"a": y, "b": x})
    assert combine_digests({"a": "1", "b": "2"}) == combine_digests({"b": "2", "a": "1"})


def test_typed_keys_are_refused():
    with pytest.raises(TypeError, match="raw key data"):
        digest(jax.random.key(0))
