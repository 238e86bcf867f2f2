"""Muon for matrices inside layers, each orthogonalised whole on one device. Second floor."""

import functools
import math
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llm.parallel.rules import MeshAxes, mesh_axes, partition_spec
from llm.training.config import OptimizerConfig

STACKED = ("layers", "experts")  # axes along which whole matrices lie, always in front


def muon_with_adam(
    config: OptimizerConfig,
    axes: dict,
    dimensions: dict,
    decay: dict,
    weight_decay: ArrayLike,
    *,
    spectral: bool,
) -> optax.GradientTransformation:
    """Return Muon for the matrices that have `dimensions`, and AdamW for the rest.

    Muon's updates are of spectral norm sqrt(max(1, fan out / fan in)), or, where `spectral`, of
    sqrt(fan out / fan in). Decay comes after both: optax's own would shrink norms and biases too,
    which have no mask there.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the exchange of matrices is that
    of Liu et al. 2025, arXiv:2502.16982, section 2.3, to all devices in place of one.
    """
    adam_rate = config.adam_learning_rate / config.learning_rate
    is_leaf = lambda x: not isinstance(x, dict)  # noqa: E731
    by_muon = jax.tree.map(lambda numbers: numbers is not None, dimensions, is_leaf=is_leaf)
    decay_muon = jax.tree.map(lambda decays, ours: decays and ours, decay, by_muon)
    decay_adam = jax.tree.map(lambda decays, ours: decays and not ours, decay, by_muon)

    momentum = optax.chain(_nesterov(config.beta1), optax.scale(-1.0))
    adam = optax.adamw(
        adam_rate,
        config.adam_beta1,
        config.beta2,
        config.epsilon,
        weight_decay=0.0,
        nesterov=True,
    )

    def orthogonalised(updates, _):
        def one(numbers, names, update):
            return update if numbers is None else _orthogonalise(update, numbers, names, spectral)

        return jax.tree.map(one, dimensions, axes, updates, is_leaf=is_leaf)

    return optax.chain(
        optax.partition({True: momentum, False: adam}, by_muon),
        optax.stateless(orthogonalised),
        optax.add_decayed_weights(-weight_decay, decay_muon),
        optax.add_decayed_weights(-weight_decay * adam_rate, decay_adam),
    )


@no_type_check  # a pytree holds shapes or shardings at times
class MomentumState(NamedTuple):
    """Steps taken, and the mean of gradients."""

    count: Int[Array, ""]
    mean: optax.Updates


def _nesterov(decay: float) -> optax.GradientTransformation:
    """Return Nesterov's momentum, its bias corrected as in `optax.contrib.muon`; which, however,
    joins the axes of layers and experts, and so gathers experts that a mesh has split."""

    def init(params):
        return MomentumState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(grads, state, _=None):
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(grads, state.mean, decay, 1)
        ahead = optax.tree.bias_correction(mean, decay, optax.safe_increment(count))
        now = optax.tree.bias_correction(grads, decay, count)
        look = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, now)
        return look, MomentumState(count, mean)

    return optax.GradientTransformation(init, update)


def _orthogonalise(
    x: Array, numbers: MuonDimensionNumbers, names: tuple[str | None, ...], spectral: bool
) -> Array:
    """Return each matrix of a stack with all its singular values near 1, times their norm.

    Where a mesh cuts the matrices, its devices exchange their parts, so that each has a share of
    the matrices whole: left to the compiler, all would be gathered by every device.
    """
    sides = numbers.reduction_axis, numbers.output_axis
    inputs, outputs = (math.prod(x.shape[i] for i in side) for side in sides)
    norm = (outputs / inputs if spectral else max(1.0, outputs / inputs)) ** 0.5
    mesh = jax.sharding.get_abstract_mesh()
    cut_by = [
        tuple(axis for axis in mesh_axes(name) if mesh.shape.get(axis, 1) > 1) for name in names
    ]
    cuts = tuple(sum((cut_by[i] for i in side), ()) for side in sides)
    local = functools.partial(_orthogonalise_parts, sides=sides, cuts=cuts)
    if any(cut_by):
        spec = partition_spec(names)
        local = jax.shard_map(local, in_specs=spec, out_specs=spec)
    return norm * local(x)


def _orthogonalise_parts(
    x: Array, *, sides: tuple[tuple[int, ...], ...], cuts: tuple[MeshAxes, ...]
) -> Array:
    """The same of a device's part of the matrices, whose sides the axes of `cuts` cut."""
    stack = tuple(i for i in range(x.ndim) if i not in (*sides[0], *sides[1]))
    order = (*stack, *sides[0], *sides[1])
    shapes = [[x.shape[i] for i in dims] for dims in (stack, *sides)]
    matrices = x.transpose(order).reshape([math.prod(shape) for shape in shapes])
    devices = math.prod(jax.lax.axis_size(axis) for axes in cuts for axis in axes)
    count = matrices.shape[0]
    matrices = jnp.pad(matrices, ((0, -count % devices), (0, 0), (0, 0)))
    exchanges = [(axes, side) for side, axes in enumerate(cuts, start=1) if axes]
    for axes, side in exchanges:
        matrices = jax.lax.all_to_all(matrices, axes, 0, side, tiled=True)
    matrices = newton_schulz(matrices)
    for axes, side in reversed(exchanges):
        matrices = jax.lax.all_to_all(matrices, axes, side, 0, tiled=True)
    whole = matrices[:count].reshape([size for shape in shapes for size in shape])
    return whole.transpose([order.index(i) for i in range(x.ndim)])


def newton_schulz(matrices: Float[Array, "M n m"]) -> Float[Array, "M n m"]:
    """Return U·S'·Vᵀ of each matrix U·S·Vᵀ, with S' near 1, by five steps of the quintic."""
    # Without momentum optax's Muon is its Newton–Schulz iteration.
    numbers = MuonDimensionNumbers(1, 2)
    alone = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
    return alone.update(matrices, alone.init(matrices))[0]
