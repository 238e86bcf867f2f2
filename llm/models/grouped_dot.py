"""Rows times the matrix of their group, the product under dropless experts. Models floor.

`jax.lax.ragged_dot`, mapped by vmap over any axis: JAX 0.10's own rule does so over the first
alone, of all operands at once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from llm.models.platforms import platform


@jax.custom_vjp
def grouped_dot(
    rows: Float[Array, "M D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Return rows · kernels[e]: the first group_sizes[0] rows with the first kernel, and so on.

    Rows beyond the groups give 0, and get and give no gradient.
    """
    return _forward(rows, kernels, group_sizes)[0]


def _forward(rows, kernels, group_sizes):
    return _dot(rows, kernels, group_sizes), (rows, kernels, group_sizes)


def _backward(inputs, cotangent):
    rows, kernels, group_sizes = inputs
    to_rows = _dot(cotangent, kernels.swapaxes(1, 2), group_sizes)
    return to_rows, _outer(rows, cotangent, group_sizes), None


grouped_dot.defvjp(_forward, _backward)


def _mapped(product: Callable[..., Array]) -> Callable[..., Array]:
    """Under vmap, take the products one after the other."""
    mapped = custom_vmap(product)

    @mapped.def_vmap
    def rule(axis_size, in_batched, *operands):
        operands = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(operands, in_batched, strict=True)
        ]
        if axis_size == 1:  # the one pipeline stage of a device
            return mapped(*(x[0] for x in operands))[None], True
        return jax.lax.map(lambda one: mapped(*one), tuple(operands)), True

    return mapped


@_mapped
def _dot(rows, kernels, group_sizes):
    inside = jnp.arange(rows.shape[0]) < jnp.sum(group_sizes)
    # masked: what a kernel leaves in rows of no group is not defined on every platform
    return jnp.where(inside[:, None], jax.lax.ragged_dot(rows, kernels, group_sizes), 0)


_TILE_ROWS, _MOST_TILE = 512, 1024  # of the kernel: 12 MB of a TPU's 16 on the chip
_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
)


@_mapped
def _outer(rows, cotangent, group_sizes):
    """Return Σ rowsᵀ · cotangent over each group: [E D F].

    On TPUs by megablox's kernel, which looks at each row once (Gale et al. 2022, arXiv:2211.15841):
    XLA masks all rows for each group in turn, E times the work.
    """
    if platform() != "tpu":
        return jax.lax.ragged_dot_general(rows, cotangent, group_sizes, _OUTER)
    return outer_by_kernel(rows, cotangent, group_sizes)


def outer_by_kernel(
    rows: Float[Array, "M D"],
    cotangent: Float[Array, "M F"],
    group_sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """The same by the TPU's kernel; `interpret` runs its program on any backend, slowly."""
    # Pallas's TPU modules are slow to load
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = _TILE_ROWS, *(min(_MOST_TILE, -(-x.shape[1] // 128) * 128) for x in (rows, cotangent))
    rows, cotangent = (
        jnp.pad(x, ((0, -x.shape[0] % _TILE_ROWS), (0, 0))) for x in (rows, cotangent)
    )
    sizes = group_sizes.astype(jnp.int32)
    return tgmm(rows.T, cotangent, sizes, rows.dtype, tiles, interpret=interpret)
