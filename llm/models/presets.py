"""Published shapes, and a depth dial for our own. Models floor, without JAX.

Parameter counts that each must give are asserted in tests/models/test_presets.py.
"""

import dataclasses
import math

from llm.models.config import TransformerConfig


def _gpt2(width: int, num_layers: int, num_heads: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=50257,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=4 * width,
        max_length_tokens=1024,
        attention_bias="all",
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        mlp_bias=True,
        tied_head=True,
    )


def _gpt3(width: int, num_layers: int, num_heads: int) -> TransformerConfig:
    return dataclasses.replace(_gpt2(width, num_layers, num_heads), max_length_tokens=2048)


def _llama(width, num_layers, num_heads, num_kv_heads, mlp_width, **other) -> TransformerConfig:
    shape = dict(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // num_heads,
        mlp_width=mlp_width,
    )
    return TransformerConfig(**(shape | other))


def _experts(num_experts: int, per_token: int, width: int, shared: int = 0) -> dict:
    return dict(
        cycle_layers=("global_moe",),
        num_experts=num_experts,
        experts_per_token=per_token,
        expert_mlp_width=width,
        shared_expert_width=shared * width,
    )


_LLAMA3 = dict(vocab_size=128_256, max_length_tokens=8192, rope_theta=500_000.0)

PRESETS: dict[str, TransformerConfig] = {
    # Radford et al. 2019, table 2; sizes as released.
    "gpt2-124m": _gpt2(768, 12, 12),
    "gpt2-355m": _gpt2(1024, 24, 16),
    "gpt2-774m": _gpt2(1280, 36, 20),
    "gpt2-1.5b": _gpt2(1600, 48, 25),
    # Brown et al. 2020, arXiv:2005.14165, table 2.1. The table contradicts itself twice. XL: 24
    # heads of 128 are not 2,048 wide; taken as 16 × 128. 13B: 5,140 is not 40 heads of 128; taken
    # as 5,120.
    # The paper's alternating sparse layers are dense here: the parameters are the same.
    "gpt3-125m": _gpt3(768, 12, 12),
    "gpt3-350m": _gpt3(1024, 24, 16),
    "gpt3-760m": _gpt3(1536, 24, 16),
    "gpt3-1.3b": _gpt3(2048, 24, 16),
    "gpt3-2.7b": _gpt3(2560, 32, 32),
    "gpt3-6.7b": _gpt3(4096, 32, 32),
    "gpt3-13b": _gpt3(5120, 40, 40),
    "gpt3-175b": _gpt3(12288, 96, 96),
    # Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783, table 3.
    "llama2-7b": _llama(4096, 32, 32, 32, 11008, vocab_size=32_000, max_length_tokens=4096),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, **_LLAMA3),
    "llama3-70b": _llama(8192, 80, 64, 8, 28672, **_LLAMA3),
    # Allal et al. 2025, arXiv:2502.02737.
    "smollm2-135m": _llama(
        576,
        30,
        9,
        3,
        1536,
        vocab_size=49_152,
        max_length_tokens=8192,
        rope_theta=100_000.0,
        tied_head=True,
    ),
    # Jiang et al. 2024, arXiv:2401.04088, table 1, and config.json of
    # huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1 at
    # eba92302a2861cdc0098cc54bc9f17cb2c47eb61.
    "mixtral-8x7b": _llama(
        4096,
        32,
        32,
        8,
        14336,
        vocab_size=32_000,
        max_length_tokens=32_768,
        rope_theta=1_000_000.0,
        **_experts(8, 2, 14336),
    ),
    # Dai et al. 2024, arXiv:2401.06066, section 5.1.2: two shared experts beside six of 64, the
    # first layer dense; its width and the experts' from config.json of
    # huggingface.co/deepseek-ai/deepseek-moe-16b-base (as kept in vltnmmdv/deepseek-moe-16b-base at
    # 3cb04456ff2980b9c334fbb08c07e542dfd66ab8).
    "deepseek-moe-16b": _llama(
        2048,
        28,
        16,
        16,
        10944,
        vocab_size=102_400,
        max_length_tokens=4096,
        norm_epsilon=1e-6,
        prefix_layers=("global",),
        router_renormalise=False,
        **_experts(64, 6, 1408, shared=2),
    ),
    # Moonshot AI 2025, arXiv:2507.20534, table 2 (Kimi K2), widths from its config.json as in
    # github.com/AI-Hypercomputer/maxtext, src/MaxText/configs/models/kimi-k2-1t.yml at
    # 48445cf00e73064e87886539714a8ba1794ee019; but with eight key-value heads of 128 (grouped
    # queries) for its multi-head latent attention: 1.9B parameters more. Its balance comes from a
    # bias on the choice of experts; here it is the loss's.
    "moe-1t": _llama(
        7168,
        61,
        64,
        8,
        18432,
        vocab_size=163_840,
        head_dim=128,
        max_length_tokens=4096,
        rope_theta=50_000.0,
        norm_epsilon=1e-6,
        prefix_layers=("global",),
        router_scores="sigmoid",
        router_scale=2.827,
        **_experts(384, 8, 2048, shared=1),
    ),
    # Yang et al. 2025, arXiv:2505.09388, tables 1 and 2: layers, heads, experts. Widths from the
    # released config.json; of the one with experts as in transformers' Qwen3MoeConfig and
    # gitcode.com/Ascend/MindSpeed-RL/blob/master/configs/model/qwen3_30b_a3b.yaml.
    "qwen3-30b-a3b": _llama(
        2048,
        48,
        32,
        4,
        6144,
        vocab_size=151_936,
        head_dim=128,
        max_length_tokens=40_960,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        qk_norm=True,
        **_experts(128, 8, 768),
    ),
    "qwen3-0.6b": _llama(
        1024,
        28,
        16,
        8,
        3072,
        vocab_size=151_936,
        head_dim=128,
        max_length_tokens=40_960,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        qk_norm=True,
        tied_head=True,
    ),
}


def from_depth(
    depth: int,
    *,
    vocab_size: int,
    max_length_tokens: int,
    head_dim: int = 64,
    width_per_layer: int = 64,
) -> TransformerConfig:
    """Return our own model of that many layers: the one dial from which its whole shape follows.

    Width is 64 a layer, so that depth 12 is 768 wide; heads fill the width. Rotary positions,
    qk-norm, squared ReLU, a free head: nanochat's choices, which train fast at every size.
    """
    width = width_per_layer * depth
    if depth < 1 or width % head_dim:
        step = head_dim // math.gcd(head_dim, width_per_layer)
        raise ValueError(
            f"depth={depth} gives width {width}, which heads of {head_dim} do not fill; "
            f"choose a depth that is a multiple of {step}"
        )
    return TransformerConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=depth,
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        mlp_width=4 * width,
        max_length_tokens=max_length_tokens,
        qk_norm=True,
        activation="relu_squared",
        initializer="fan_in",
    )
