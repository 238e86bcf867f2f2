"""Kernels stored in 8 or 4 bits, through qwix's arrays. Models floor.

A stored kernel is two parameters: `kernel_int8` or `kernel_nf4` (two 4-bit codes a byte, along the
last axis), and `kernel_scale`.
"""

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float

from llm.models.config import AdapterConfig

Stored = dict[str, Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
SCALE = "kernel_scale"
_KINDS = {"kernel_int8": jnp.int8, "kernel_nf4": "nf4"}  # parameter's name → qwix's type


def stored_shapes(
    adapter: AdapterConfig, shape: tuple[int, ...], num_stacked: int, num_inputs: int
) -> Shapes:
    """Return the parameters that store kernels of which `num_stacked` leading axes count (experts),
    whose next `num_inputs` axes are summed over.

    int8 has a scale an output; nf4 one for each block of inputs along the last input axis.

    Raises:
      ValueError: nf4, and the last axis is odd.
    """
    first_output = num_stacked + num_inputs
    codes, dtype = list(shape), jnp.int8
    scale = [*shape[:num_stacked], *[1] * num_inputs, *shape[first_output:]]
    if adapter.quantize == "nf4":
        if shape[-1] % 2:
            raise ValueError(f"adapter.quantize='nf4' stores pairs: {shape[-1]} outputs are odd")
        codes[-1], dtype = codes[-1] // 2, jnp.uint8
        rows = shape[first_output - 1]
        block = next(n for n in range(min(adapter.block, rows), 0, -1) if rows % n == 0)
        scale = [*shape[: first_output - 1], rows // block, *shape[first_output:]]
    return {
        f"kernel_{adapter.quantize}": jax.ShapeDtypeStruct(tuple(codes), dtype),
        SCALE: jax.ShapeDtypeStruct(tuple(scale), jnp.float32),
    }


def quantize_kernel(kernel: Float[Array, "..."], like: Shapes | Stored) -> Stored:
    """Return a kernel stored in parameters of these names and shapes; stacked layers stay apart."""
    name = _codes(like)
    axes = list(enumerate(zip(kernel.shape, like[SCALE].shape, strict=True)))
    array = qwix.quantize(
        kernel.astype(jnp.float32),
        _KINDS[name],
        channelwise_axes=[i for i, (n, scales) in axes if n == scales],
        tiled_axes={i: n // scales for i, (n, scales) in axes if 1 < scales < n},
    )
    codes = array.qvalue
    if name == "kernel_nf4":
        codes = codes.astype(jnp.uint8)
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {name: codes, SCALE: array.scale}


def dequantize_kernel(stored: Stored) -> Float[Array, "..."]:
    """Return the float32 kernel that stored parameters stand for."""
    name = _codes(stored)
    codes = stored[name]
    if name == "kernel_nf4":
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
        codes = pairs.reshape(*codes.shape[:-1], -1).astype(jnp.uint4)
    return qwix.dequantize(qwix.QArray(codes, stored[SCALE], qtype=_KINDS[name]))


def is_stored(node: object) -> bool:
    """Whether a dict of parameters holds a quantised kernel."""
    return isinstance(node, dict) and SCALE in node


def _codes(stored: Shapes | Stored) -> str:
    return next(name for name in _KINDS if name in stored)
