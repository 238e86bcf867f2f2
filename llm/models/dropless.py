"""Experts that take every token that chooses them. Models floor.

Tokens are sorted by expert and multiplied group by group. On a mesh each device does so with its
own tokens, sent to the devices that hold their experts and back. Source: Gale et al. 2022,
arXiv:2211.15841 (MegaBlocks), with ragged products for its block-sparse ones.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llm.models.exchange import exchange_rows
from llm.models.feed_forward import Hidden
from llm.models.projection import Weights
from llm.models.router import Routing
from llm.parallel.rules import mesh_axes, partition_spec, ways

Rows = Float[Array, "M D"]
Counts = Int[Array, " E"]
# (kernels, rows that lie expert by expert, how many each expert has) → their outputs
FeedRows = Callable[[dict[str, Weights], Rows, Counts], Rows]


def dropless(
    x: Hidden,
    routing: Routing,
    real: Bool[Array, "B T"] | None,
    weights: dict[str, Weights],
    axes: dict[str, dict[str, tuple[str | None, ...]]],
    feed: FeedRows,
    *,
    gathered: bool = False,
) -> Hidden:
    """Return each token's weighted sum of experts' outputs; `axes` are the weights' logical ones.

    On a mesh, weights are gathered over fsdp at their use, unless they are `gathered` (as those are
    that decode), and their gradients scattered over it.
    """
    num_experts = routing.scores.shape[-1]
    experts = routing.experts
    if real is not None:
        experts = jnp.where(real[..., None], experts, num_experts)  # to no expert
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _route(x, experts, routing.weights, weights, feed, num_experts, 1)
    if gathered:
        axes = jax.tree.map(
            lambda names: tuple(None if n == "embed" else n for n in names), axes, is_leaf=_is_axes
        )
    specs = jax.tree.map(partition_spec, axes, is_leaf=_is_axes)
    tokens = partition_spec(("activation_batch", "activation_length", None))

    parts = mesh_axes("expert_mlp")  # along which devices hold features of the same experts

    def local(x, experts, gates, weights):
        weights = jax.tree.map(_gather, weights, axes)
        return _route(x, experts, gates, weights, feed, num_experts, ways(mesh, "experts"))[None]

    # Unchecked: the kernels of TPUs do not tell along which axes their results vary.
    mapped = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, specs),
        out_specs=PartitionSpec(parts, *tokens),
        check_vma=False,
    )
    padded = (
        _pad(x, mesh),
        _pad(experts, mesh, num_experts),
        _pad(routing.weights, mesh),
    )
    return jnp.sum(mapped(*padded, weights), axis=0)[: x.shape[0], : x.shape[1]]


def _route(
    x: Array,
    experts: Array,
    gates: Array,
    weights: dict[str, Weights],
    feed: FeedRows,
    num_experts: int,
    num_devices: int,
) -> Array:
    """Return the weighted sums [B T D] of this device's tokens."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)  # stable, and choices of no expert last
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = x.reshape(-1, x.shape[-1])
    back = jnp.argsort(order)
    rows = take_rows(rows, order // gates.shape[-1], back)
    if num_devices == 1:
        out = feed(weights, rows, sizes)
    else:
        out = exchange_rows(
            rows,
            sizes.reshape(num_devices, -1),
            functools.partial(_feed_unsorted, weights, feed),
            most_per_token=gates.shape[-1],
        )
    out = take_rows(out, back, order).reshape(*gates.shape, -1)
    return jnp.einsum("BTAD,BTA->BTD", out, gates.astype(out.dtype))


def _feed_unsorted(
    weights: dict[str, Weights], feed: FeedRows, rows: Array, experts: Array, sizes: Array
) -> Array:
    """Return the outputs for rows in any order, of which it is known what expert each wants."""
    order = jnp.argsort(experts)
    back = jnp.argsort(order)
    return take_rows(feed(weights, take_rows(rows, order, back), sizes), back, order)


@jax.custom_vjp
def take_rows(
    rows: Float[Array, "M D"], index: Int[Array, " R"], back: Int[Array, " R"]
) -> Float[Array, "R D"]:
    """Return rows[index], where each row is taken R / M times and `back` sorts a row's takes
    together: the gradient is a gather too, where a scatter is slow, and on GPUs not deterministic.
    """
    return rows[index]


def _take_forward(rows, index, back):
    return rows[index], (back, rows.shape[0])


def _take_backward(kept, cotangent):
    back, num_rows = kept
    gathered = cotangent[back].reshape(num_rows, -1, cotangent.shape[-1])
    return jnp.sum(gathered, axis=1), None, None


take_rows.defvjp(_take_forward, _take_backward)


def _gather(weight: Array, names: tuple[str | None, ...]) -> Array:
    """Return a weight whole along the residual width, whose gradient goes back scattered."""
    cuts = mesh_axes("embed") if "embed" in names else ()  # none where a group has it whole
    for axis in cuts:
        weight = jax.lax.all_gather(weight, axis, axis=names.index("embed"), tiled=True)
    return weight


def _pad(x: Array, mesh: jax.sharding.AbstractMesh, value: int = 0) -> Array:
    """Return [B T ...] with rows and positions added until the mesh divides them."""
    names = ("activation_batch", "activation_length")
    parts = [ways(mesh, name) for name in names]
    more = [(0, -size % n) for size, n in zip(x.shape, parts, strict=False)]
    return jnp.pad(x, (*more, (0, 0)), constant_values=value)


def _is_axes(x: object) -> bool:
    return isinstance(x, tuple)
