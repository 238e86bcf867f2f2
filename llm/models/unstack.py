"""The same model with no stacked layers: what decoding runs. Models floor.

A loop that slices one layer out of stacked parameters copies every weight at every token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm.models.transformer import Transformer


def unstack(model: Transformer, params: dict) -> tuple[Transformer, dict]:
    """Return a model whose layers are all prefix layers, and its parameters in the compute dtype.

    It computes exactly what the given model does. Inside jit this is the place to call it once,
    before a loop; a model that is unstacked already comes back as it is.
    """
    config, stacked = model.config, params.get("cycle", {})
    flat = {name: tree for name, tree in params.items() if name != "cycle"}
    depth = len(config.prefix_layers)
    for i in range(config.num_cycles):
        for j in range(len(config.cycle_layers)):
            layer = jax.tree.map(lambda x, i=i: x[i], stacked[f"layer_{j}"])
            flat[f"prefix_{depth + i * len(config.cycle_layers) + j}"] = layer
    dtype = jnp.dtype(model.compute.dtype)
    config = dataclasses.replace(config, prefix_layers=config.layer_kinds)
    compute = dataclasses.replace(model.compute, remat="none")
    return Transformer(config, compute), jax.tree_util.tree_map_with_path(
        lambda path, x: x if _is_norm(path) else x.astype(dtype), flat
    )


def _is_norm(path) -> bool:
    """Whether a parameter belongs to a norm, which computes in float32 whatever the dtype."""
    return any(str(getattr(entry, "key", "")).endswith("norm") for entry in path)
