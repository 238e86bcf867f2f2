"""Sharding is a table: logical axis name → mesh axes. Ground floor."""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

MeshAxes = tuple[str, ...]

# Activation names start with "activation_" so that the two halves can never collide.
RULES: dict[str, MeshAxes] = {
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "router": (),  # the experts as the router's outputs: all of them are scored everywhere
    "positions": (),
    "norm": (),
    "activation_batch": ("data", "fsdp", "expert"),
    "activation_length": ("context",),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "activation_kv_heads": ("tensor",),
    "activation_head_dim": (),
    "activation_mlp": ("tensor",),
    "activation_experts": ("expert",),
    "activation_expert_batch": ("data", "fsdp"),  # of tokens that have gone to their experts
    "activation_capacity": ("context",),
    "activation_expert_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
    "activation_cache_length": (),
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dimensions have these logical names."""
    spec = []
    for name in axes:
        mesh_axes = () if name is None else RULES[name]
        spec.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*spec)


def ways(mesh: Mesh, name: str) -> int:
    """Return into how many parts the mesh cuts a dimension of that logical name."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def constrain(x: ArrayLike, *axes: str | None) -> ArrayLike:
    """Constrain x's sharding by its logical axes under the mesh in force; without one, return x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def make_shardings(mesh: Mesh, axes_tree, shapes_tree):
    """Return NamedShardings for a tree of logical axes, checked against the arrays' shapes.

    Raises:
      ValueError: a dimension is not divisible by the mesh axes that its rule assigns to it.
    """

    def one(path, axes, shape):
        for name, size in zip(axes, shape.shape, strict=True):
            if name and size % ways(mesh, name):
                raise ValueError(
                    f"mesh axes {RULES[name]} split {ways(mesh, name)} ways, but "
                    f"{jax.tree_util.keystr(path)} has {size} along '{name}'; choose a mesh that "
                    f"divides {size}"
                )
        return NamedSharding(mesh, partition_spec(axes))

    return jax.tree_util.tree_map_with_path(
        one, axes_tree, shapes_tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the sharding of a batch array: sequences on axis 0, positions on axis 1."""
    names = ("activation_batch", "activation_length")[:ndim]
    return NamedSharding(mesh, partition_spec(names))
