"""Parameters and FLOPs of a transformer. Third floor: what MFU and scaling laws count with.

FLOPs are those of matrix products, two for each multiply-add; norms and activations, about a
hundredth of them, are left out.
"""

import dataclasses
import math

import jax

from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, param_shapes


def num_params(config: TransformerConfig) -> int:
    """Return the number of parameters, over the true vocabulary (padding rows left out)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_true_shapes(config)))


def num_active_params(config: TransformerConfig) -> int:
    """Return the parameters that multiply each token: the head counted, lookup tables and experts
    that a token does not go to left out."""
    lookups = 0 if config.tied_head else config.vocab_size * config.width
    if config.positions == "learned":
        lookups += config.max_length_tokens * config.width
    return num_params(config) - lookups - _idle_expert_params(config)


def num_layer_params(config: TransformerConfig) -> int:
    """Return the parameters that multiply each token, without the head.

    Source: the N of Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    return num_active_params(config) - config.vocab_size * config.width


def num_relative_projection_params(config: TransformerConfig) -> int:
    """Return what Transformer-XL's relative positions would add: a projection of the position
    and two biases of the query in each layer.

    Source: Dai et al. 2019, arXiv:1901.02860, section 3.3; Gopher and Chinchilla have them.
    """
    inner = config.num_heads * config.head_dim
    return config.num_layers * (config.width * inner + 2 * inner)


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs a token at one length, by part."""

    projections: float  # kernels inside layers
    attention: float  # queries with keys, weights with values
    head: float

    def forward(self, *, attention: bool = True, head: bool = True) -> float:
        """Return the FLOPs of a forward pass a token, those of attention and head as asked."""
        return self.projections + attention * self.attention + head * self.head

    def training(self, *, attention: bool = True, head: bool = True) -> float:
        """Return those of forward and backward: each product has two in the backward pass.

        Without attention and head it is Kaplan's 6·N (arXiv:2001.08361, section 2.1), with both
        Hoffmann's count (arXiv:2203.15556, appendix F) less his embedding, which is a lookup here.
        """
        return 3.0 * self.forward(attention=attention, head=head)


def count_flops(
    config: TransformerConfig, length_tokens: int, *, causal_half: bool = True
) -> FlopsPerToken:
    """Return the FLOPs a token of sequences of that length.

    Of experts those count that a token goes to. With `causal_half` a query meets the keys that it
    may see: half of them, or its window's.
    Without, it meets all T, as kernels compute that mask scores afterwards, and as XLA counts.
    """
    kernels = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(_true_shapes(config))
        if path[-1].key == "kernel"
    )
    head = config.width * config.vocab_size
    if not config.tied_head:
        kernels -= head
    attention = sum(
        4.0 * config.num_heads * config.head_dim * keys
        for keys in _keys_per_query(config, length_tokens, causal_half)
    )
    kernels -= _idle_expert_params(config)
    return FlopsPerToken(2.0 * kernels, attention, 2.0 * head)


def training_flops_per_token(config: TransformerConfig, length_tokens: int) -> float:
    """Return the FLOPs of forward and backward a token, the convention of MFU.

    6 · active parameters + 12·N·H·S a layer, where S is the number of keys a query sees: T, or the
    window of a local layer; half of it for causal attention. It differs from `count_flops` by the
    norms' and biases' parameters.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; the causal half is ours.
    """
    attention = count_flops(config, length_tokens).attention
    return 6.0 * num_active_params(config) + 3.0 * attention


def _keys_per_query(config: TransformerConfig, length: int, causal_half: bool) -> list[float]:
    """Return how many keys a query meets in each layer."""
    if not causal_half:
        return [float(length)] * config.num_layers
    visible = length / 2 if config.attention == "causal" else float(length)
    return [
        min(visible, config.sliding_window_tokens) if kind.startswith("local") else visible
        for kind in config.layer_kinds
    ]


def _idle_expert_params(config: TransformerConfig) -> int:
    """Return the parameters of the experts that a token does not go to, over all layers."""
    each = (3 if config.gated else 2) * config.width * config.expert_mlp_width
    return config.moe_layers * (config.num_experts - config.experts_per_token) * each


def _true_shapes(config: TransformerConfig) -> dict:
    return param_shapes(Transformer(dataclasses.replace(config, vocab_multiple=1)))
