"""The same model with no stacked layers: what decoding runs. Models floor.

A loop that takes one layer's weights out of stacked ones copies all of them at every token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm.models.transformer import Transformer, logical_axes
from llm.parallel.rules import constrain


def unstacked(model: Transformer) -> Transformer:
    """Return the same model with all its layers in the prefix; see `unstack` for its parameters."""
    config = dataclasses.replace(model.config, prefix_layers=model.config.layer_kinds)
    return Transformer(config, dataclasses.replace(model.compute, remat="none"), model.adapter)


def unstack(model: Transformer, params: dict) -> dict:
    """Return the parameters of `unstacked(model)` in the compute dtype, each whole but for tensor.

    Norms, routers and quantised kernels keep their types, as in the model itself. To be called
    once, before a loop over tokens; of an unstacked model the parameters come back as they are.
    NumPy arrays stay on the host.
    """
    config, dtype = model.config, jnp.dtype(model.compute.dtype)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if _keeps_type(path) else x.astype(dtype, copy=False), params
    )
    if not jax.sharding.get_abstract_mesh().empty:
        # else every token would gather every weight again
        params = jax.tree.map(_gather, params, logical_axes(model))
    flat = {name: tree for name, tree in params.items() if name != "cycle"}
    place = len(config.prefix_layers)
    for i in range(config.num_cycles):
        for j in range(len(config.cycle_layers)):
            layer = jax.tree.map(lambda x, i=i: x[i], params["cycle"][f"layer_{j}"])
            flat[f"prefix_{place}"] = layer
            place += 1
    return flat


def _keeps_type(path) -> bool:
    """Whether a parameter is of a norm or router, which compute in float32, or of a quantised
    kernel."""
    names = [str(getattr(entry, "key", "")) for entry in path]
    in_float32 = any(name.endswith(("norm", "router")) for name in names)
    return in_float32 or names[-1].startswith("kernel_")


def _gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(x, *(None if name in ("embed", "layers") else name for name in axes))
