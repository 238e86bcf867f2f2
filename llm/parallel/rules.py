"""Sharding is a table: logical axis name → mesh axes. Ground floor."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

MeshAxes = tuple[str, ...]

# Activation names start with "activation_" so that the two halves can never collide.
RULES: dict[str, MeshAxes] = {
    "layers": ("pipeline",),
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
    # Outside the stages of a pipeline its devices share the batch too: embedding and head.
    "activation_batch": ("data", "fsdp", "pipeline", "expert"),
    "activation_length": ("context",),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "activation_kv_heads": ("tensor",),
    "activation_whole_row_heads": ("tensor", "context"),  # where each device sees whole rows
    "activation_head_dim": (),
    "activation_mlp": ("tensor",),
    "activation_experts": ("expert",),
    # Of tokens that have gone to their experts.
    "activation_expert_batch": ("data", "fsdp", "pipeline"),
    "activation_capacity": ("context",),
    "activation_expert_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
    "activation_cache_length": (),
}

_OF_STAGES = ("data", "fsdp", "pipeline")
_in_stage = contextvars.ContextVar("in_stage", default=False)


@contextlib.contextmanager
def inside_stage() -> Iterator[None]:
    """Within the block arrays are those of one stage and one group of devices along data and fsdp,
    whose axes split nothing there: see llm/models/pipeline.py."""
    before = _in_stage.set(True)
    try:
        yield
    finally:
        _in_stage.reset(before)


def mesh_axes(name: str | None) -> MeshAxes:
    """Return the mesh axes that cut a dimension of that logical name."""
    axes = () if name is None else RULES[name]
    if _in_stage.get():
        return tuple(axis for axis in axes if axis not in _OF_STAGES)
    return axes


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dimensions have these logical names."""
    found = map(mesh_axes, axes)
    return PartitionSpec(*(cuts[0] if len(cuts) == 1 else (cuts or None) for cuts in found))


def ways(mesh: Mesh | AbstractMesh, name: str) -> int:
    """Return into how many parts the mesh cuts a dimension of that logical name."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def ways_in_force(name: str) -> int:
    """Return the same of the mesh in force; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else ways(mesh, name)


def constrain(x: ArrayLike, *axes: str | None) -> ArrayLike:
    """Constrain x's sharding by its logical axes under the mesh in force; without one, return x.

    A dimension that its mesh axes do not divide stays whole: one token of a row that is decoded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fitting = tuple(
        name if name and size % ways(mesh, name) == 0 else None
        for name, size in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, partition_spec(fitting))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: ArrayLike, axes: tuple[str | None, ...]) -> ArrayLike:
    """Return a parameter of these logical axes gathered over fsdp, where loops are to share it.

    Its gradient is cut again where it is summed: the compiler then sums just what a device keeps.
    """
    return constrain(x, *(None if name == "embed" else name for name in axes))


def _gathered_forward(x, axes):
    return gathered(x, axes), None


def _gathered_backward(axes, _, cotangent):
    return (constrain(cotangent, *axes),)


gathered.defvjp(_gathered_forward, _gathered_backward)


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


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a batch array: sequences on axis 0, positions on axis 1.

    An axis 1 that the context axis does not divide stays whole: it counts no positions.
    """
    names: tuple[str | None, ...] = ("activation_batch", "activation_length")[: len(shape)]
    if len(shape) > 1 and shape[1] % ways(mesh, "activation_length"):
        names = ("activation_batch", None)
    return NamedSharding(mesh, partition_spec(names))
