"""Parameters and FLOPs of a transformer. Third floor: what MFU and scaling laws count with."""

import dataclasses
import math

import jax

from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, param_shapes


def num_params(config: TransformerConfig) -> int:
    """Return the number of parameters, over the true vocabulary (padding rows left out)."""
    true = dataclasses.replace(config, vocab_multiple=1)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(Transformer(true))))


def num_active_params(config: TransformerConfig) -> int:
    """Return the parameters that multiply each token: the head counted, lookup tables left out."""
    lookups = 0 if config.tied_head else config.vocab_size * config.width
    if config.positions == "learned":
        lookups += config.max_length_tokens * config.width
    return num_params(config) - lookups


def training_flops_per_token(config: TransformerConfig, length_tokens: int) -> float:
    """Return the FLOPs of forward and backward a token, the convention of MFU.

    6 · active parameters + 12·N·H·S a layer, where S is the number of keys a query sees: T, or the
    window of a local layer; half of it for causal attention.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; the causal half is ours.
    """
    flops = 6.0 * num_active_params(config)
    for kind in config.layer_kinds:
        keys = length_tokens
        if config.attention == "causal":
            keys /= 2
        if kind == "local":
            keys = min(keys, config.sliding_window_tokens)
        flops += 12.0 * config.num_heads * config.head_dim * keys
    return flops
