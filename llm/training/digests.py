"""Checksums of arrays, the same on every mesh: proof that what was saved is what was restored.
Each element's bits are mixed with its global index and summed, so order of summation is free."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

ArrayLike = jax.Array | np.ndarray | np.generic


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, such as "params/head/kernel", in the tree's order.

    Raises:
      ValueError: two leaves have the same path.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two leaves of the state are called {name!r}; rename one")
        named[name] = leaf
    return named


def _mix(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """MurmurHash3's finaliser: a bijection of 32 bits; each input bit moves half of them."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _linear_index(shape: tuple[int, ...], dimensions: range) -> UInt32[Array, "*shape"]:
    """Return each element's row-major index over some of the dimensions, modulo 2^32."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for d in reversed(dimensions):
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, d)
        index, stride = index + iota * jnp.uint32(stride % 2**32), stride * shape[d]
    return index


def _bits(x: jax.Array) -> UInt32[Array, "..."]:
    """Return the array's bits as 32-bit words; 8-byte elements give two words each."""
    real = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == jnp.bool_
    if not real or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"no checksum for dtype {x.dtype}; store real numbers or raw key data")
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize < 4:
        if x.dtype.name in ("int2", "int4", "uint2", "uint4"):
            return x.astype(jnp.uint8).astype(jnp.uint32)
        narrow = {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


@jax.jit
def _two_sums(x: jax.Array) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    bits = _bits(x)
    # The index needs more than 32 bits in the largest stacked arrays: the trailing dimensions
    # that fit 32 bits make one word, the leading ones another.
    split = bits.ndim
    while split > 0 and math.prod(bits.shape[split - 1 :]) < 2**32:
        split -= 1
    low = _linear_index(bits.shape, range(split, bits.ndim))
    high = _linear_index(bits.shape, range(split))
    # A bijection of the bits at each index, so that one changed element always shows.
    word = _mix(bits ^ (low * jnp.uint32(0x9E3779B1) + high * jnp.uint32(0x7FEB352D)))
    second = (word ^ (word >> 15)) * (word + high * jnp.uint32(0x846CA68B))
    # One reduction of both words reads the array once: on CPU 25 times faster than two sums.
    zero = jnp.uint32(0)
    return jax.lax.reduce(
        (word, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), range(bits.ndim)
    )


def start_digest(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Start an array's checksum on its device, without waiting: two sums modulo 2^32."""
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        if x.dtype.itemsize == 8 and x.dtype.kind in "iuf":
            # Without 64-bit mode JAX would round these; the words are the ones it would see.
            x = np.ascontiguousarray(x).reshape(-1).view(np.uint32).reshape(*x.shape, 2)
    return _two_sums(x)


def finish_digest(sums: tuple[jax.Array, jax.Array]) -> str:
    """Wait for a checksum and return it as 16 hexadecimal digits."""
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def array_digests(tree: Any) -> dict[str, str]:
    """Return the checksum of each leaf by path: equal bits give equal digits on every mesh."""
    started = {name: start_digest(leaf) for name, leaf in named_leaves(tree).items()}
    return {name: finish_digest(sums) for name, sums in started.items()}


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return 16 hexadecimal digits for a set of named checksums, whatever their order."""
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tree_digest(tree: Any) -> str:
    """Return 16 hexadecimal digits for a tree's paths and bits, such as a model's parameters."""
    return combine_digests(array_digests(tree))
