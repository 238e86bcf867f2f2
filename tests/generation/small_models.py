"""Small models of every kind, for the tests of decoding."""

import dataclasses
import functools

import jax

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, init_params

VOCAB = 61
SMALL = TransformerConfig(
    vocab_size=VOCAB,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=6,
    mlp_width=32,
    max_length_tokens=32,
    vocab_multiple=8,
)
KINDS = {
    "llama": dict(num_kv_heads=2),
    "gpt2": dict(
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        mlp_bias=True,
        attention_bias="all",
        tied_head=True,
    ),
    "alibi_mqa": dict(positions="alibi", num_kv_heads=1),
    "window": dict(cycle_layers=("local",), sliding_window_tokens=3, qk_norm=True),
    "prefix_and_cycle": dict(
        num_layers=3,
        prefix_layers=("global",),
        cycle_layers=("local", "global"),
        sliding_window_tokens=4,
        attention_softcap=5.0,
        head_softcap=9.0,
    ),
    "experts": dict(
        num_layers=3,
        prefix_layers=("global",),
        cycle_layers=("global_moe",),
        num_experts=5,
        experts_per_token=2,
        expert_mlp_width=12,
        shared_expert_width=8,
    ),
}


@functools.cache
def build(kind: str, **compute):
    """Return (model, params), with weights large enough for sharp attention and varied text."""
    config = dataclasses.replace(SMALL, **KINDS[kind])
    model = Transformer(config, ComputeConfig(**compute))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(1))
    return model, jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)
