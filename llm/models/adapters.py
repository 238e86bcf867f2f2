"""From a model's parameters to those of the same model with an adapter, and back. Models floor."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from llm.models.config import AdapterConfig
from llm.models.quantization import dequantize_kernel, is_stored, quantize_kernel
from llm.models.transformer import Model, init_params

_FACTORS = ("lora_a", "lora_b")


def is_factor(name: str) -> bool:
    """Whether the last part of a parameter's path names a low-rank factor."""
    return name in _FACTORS


def adapt_params(model: Model, params: dict, key: Key[Array, ""]) -> dict:
    """Return parameters of `model`, with its adapter, from those of the same model without one.

    Kernels are quantised as the adapter says, and factors are fresh: the model begins as it was, up
    to quantisation.
    """

    def one(fresh: Any, given: Any) -> Any:
        if not isinstance(fresh, dict):
            return given
        adapted = {}
        if is_stored(fresh):
            adapted |= quantize_kernel(given["kernel"], fresh)
        for name, part in fresh.items():
            if name not in adapted:
                adapted[name] = part if is_factor(name) else one(part, given[name])
        return adapted

    if model.adapter == AdapterConfig():
        return params
    return one(jax.jit(functools.partial(init_params, model))(key), params)


def merge_params(model: Model, params: dict) -> dict:
    """Return parameters of the same model without its adapter: kernel + alpha / rank · a · b."""
    scale = model.adapter.alpha / max(1, model.adapter.rank)

    def one(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        merged = {
            name: one(part)
            for name, part in node.items()
            if not is_factor(name) and not name.startswith("kernel_")
        }
        if is_stored(node):
            merged["kernel"] = dequantize_kernel(node)
        if "lora_a" in node:
            merged["kernel"] = merged["kernel"] + scale * _product(
                node["lora_a"], node["lora_b"], merged["kernel"].ndim
            )
        return merged

    return one(params)


def _product(a: Float[Array, "..."], b: Float[Array, "..."], ndim: int) -> Float[Array, "..."]:
    """Return a · b over the rank, for each layer and expert where they are stacked."""
    product = functools.partial(jnp.tensordot, axes=1)
    for _ in range(a.ndim + b.ndim - 2 - ndim):
        product = jax.vmap(product)
    return product(a, b)
