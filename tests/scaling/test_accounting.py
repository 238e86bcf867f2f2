"""Counts against XLA's own, published tables, and closed forms of papers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.presets import PRESETS, from_depth
from llm.models.transformer import Transformer, param_shapes
from llm.scaling.accounting import (
    count_flops,
    num_active_params,
    num_layer_params,
    num_params,
    num_relative_projection_params,
    training_flops_per_token,
)
from llm.scaling.memory import count_training_memory
from llm.training.config import OptimizerConfig
from llm.training.loss import make_causal_lm_loss

# Hoffmann et al. 2022, arXiv:2203.15556, table A9: millions of parameters, width, feed-forward
# width, head width, heads, layers. Vocabulary 32,000 (appendix F).
CHINCHILLA = """
44 512 2048 64 8 8, 57 576 2304 64 9 9, 74 640 2560 64 10 10, 90 640 2560 64 10 13,
106 640 2560 64 10 16, 117 768 3072 64 12 12, 140 768 3072 64 12 15, 163 768 3072 64 12 18,
175 896 3584 64 14 14, 196 896 3584 64 14 16, 217 896 3584 64 14 18, 251 1024 4096 64 16 16,
278 1024 4096 64 16 18, 306 1024 4096 64 16 20, 425 1280 5120 128 10 18, 489 1280 5120 128 10 21,
509 1408 5632 128 11 18, 552 1280 5120 128 10 24, 587 1408 5632 128 11 21, 632 1536 6144 128 12 19,
664 1408 5632 128 11 24, 724 1536 6144 128 12 22, 816 1536 6144 128 12 25, 893 1792 7168 128 14 20,
1018 1792 7168 128 14 23, 1143 1792 7168 128 14 26, 1266 2048 8192 128 16 22,
1424 2176 8704 128 17 22, 1429 2048 8192 128 16 25, 1593 2048 8192 128 16 28,
1609 2176 8704 128 17 25, 1731 2304 9216 128 18 24, 1794 2176 8704 128 17 28,
2007 2304 9216 128 18 28, 2283 2304 9216 128 18 32, 2298 2560 10240 128 20 26,
2639 2560 10240 128 20 30, 2980 2560 10240 128 20 34, 3530 2688 10752 128 22 36,
3802 2816 11264 128 22 36, 4084 2944 11776 128 22 36, 4516 3072 12288 128 24 36,
6796 3584 14336 128 28 40, 9293 4096 16384 128 32 42, 11452 4352 17408 128 32 47,
12295 4608 18432 128 36 44, 12569 4608 18432 128 32 47, 13735 4864 19456 128 32 47,
14940 4992 19968 128 32 49, 16183 5120 20480 128 40 47
"""


def chinchilla_model(width, mlp_width, head_dim, num_heads, num_layers) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=32_000,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        attention_bias="all",
        positions="none",
        activation="gelu",
        mlp_bias=True,
        tied_head=True,
    )


@pytest.mark.parametrize("row", CHINCHILLA.split(","), ids=str.strip)
def test_chinchillas_table(row):
    millions, *shape = map(int, row.split())
    config = chinchilla_model(*shape)
    counted = num_params(config) + num_relative_projection_params(config)
    assert counted == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(
    "name, millions, thousands_wide",
    # Brown et al. 2020, arXiv:2005.14165, table D.1
    [("gpt3-1.3b", 1320, 2.048), ("gpt3-6.7b", 6660, 4.096), ("gpt3-175b", 174_600, 12.288)],
)
def test_gpt3s_table(name, millions, thousands_wide):
    assert num_params(PRESETS[name]) == pytest.approx(millions * 1e6, rel=0.01)
    # Kaplan's closed form: 12·L·D², embeddings left out
    closed = 12 * PRESETS[name].num_layers * (thousands_wide * 1000) ** 2
    assert num_layer_params(PRESETS[name]) == pytest.approx(closed, rel=0.002)


SMALL = {
    "depth": from_depth(4, vocab_size=2048, max_length_tokens=256),
    "grouped queries": TransformerConfig(
        vocab_size=2048,
        width=256,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        mlp_width=768,
    ),
    "gpt2": TransformerConfig(
        vocab_size=2048,
        width=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        mlp_width=1024,
        activation="gelu_tanh",
        norm="layernorm",
        positions="learned",
        attention_bias="all",
        mlp_bias=True,
        tied_head=True,
    ),
    # Buffers just as large as what goes into them.
    "experts": TransformerConfig(
        vocab_size=2048,
        width=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        cycle_layers=("global_moe",),
        num_experts=8,
        experts_per_token=2,
        expert_mlp_width=256,
        shared_expert_width=128,
        expert_capacity_factor=1.0,
    ),
}
BATCH, LENGTH = 4, 256
PLAIN = ComputeConfig(attention_kernel="xla")


@functools.cache
def compiled_loss(config: TransformerConfig, compute: ComputeConfig = PLAIN, *, gradient: bool):
    model = Transformer(config, compute)
    loss_fn = make_causal_lm_loss(model)
    objective = lambda params, batch: loss_fn(params, batch, None)[0]  # noqa: E731
    integers = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), integers)
    batch["loss_weights"] = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32)
    wanted = jax.grad(objective) if gradient else objective
    return jax.jit(wanted).lower(param_shapes(model), batch).compile()


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", SMALL)
def test_flops_are_what_xla_counts(name, gradient):
    flops = count_flops(SMALL[name], LENGTH, causal_half=False)
    ours = flops.training() if gradient else flops.forward()
    xlas = compiled_loss(SMALL[name], gradient=gradient).cost_analysis()["flops"]
    assert ours * BATCH * LENGTH == pytest.approx(xlas, rel=0.02)


def test_parts_of_the_flops_by_hand():
    config = SMALL["grouped queries"]
    flops = count_flops(config, 100)
    # query and out 256·256, key and value 256·64, three of 256·768
    layer = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 768
    assert flops.projections == 2 * 3 * layer
    assert flops.attention == 3 * 4 * 256 * 50
    assert flops.head == 2 * 256 * 2048
    assert flops.training(attention=False, head=False) == 6 * 3 * layer
    assert count_flops(config, 100, causal_half=False).attention == 2 * flops.attention
    # The MFU convention: the same but for the seven norms' scales.
    assert training_flops_per_token(config, 100) == flops.training() + 6 * 7 * 256


def test_a_window_bounds_the_keys():
    config = dataclasses.replace(
        SMALL["grouped queries"],
        num_layers=4,
        cycle_layers=("local", "global"),
        sliding_window_tokens=16,
    )
    per_key = 4 * 256
    assert count_flops(config, 100).attention == per_key * 2 * (16 + 50)


@pytest.mark.parametrize(
    "shape, ratio",
    [
        ((640, 2560, 64, 10, 10), 1.03),
        ((1024, 4096, 64, 16, 20), 1.10),
        ((1280, 5120, 128, 10, 24), 1.08),
        ((1792, 7168, 128, 14, 26), 1.04),
        ((2048, 8192, 128, 16, 28), 1.03),
        ((3584, 14336, 128, 28, 40), 0.99),
    ],
)
def test_hoffmanns_ratio_to_six_n(shape, ratio):
    """Hoffmann et al. 2022, table A4: FLOPs by their appendix F over 6·N·D.

    Their table leaves embedding and head out of the FLOPs (not out of N), and counts three FLOPs a
    score for the softmax, which are no product and not counted here.
    """
    config = chinchilla_model(*shape)
    params = num_params(config) + num_relative_projection_params(config)
    softmax = 3 * 3 * config.num_heads * config.num_layers * 2048
    flops = count_flops(config, 2048, causal_half=False).training(head=False) + softmax
    assert flops / (6 * params) == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize("remat, within", [("none", 0.12), ("full", 0.25), ("dots", 0.25)])
@pytest.mark.parametrize("name", SMALL)
def test_activations_are_near_what_xla_holds(name, remat, within):
    """XLA's temporary buffers of a gradient: activations, a tile's logits, and scratch.

    Rolled under rematerialisation: on CPUs XLA merges unrolled layers' two computations.
    """
    compute = dataclasses.replace(PLAIN, remat=remat, unroll_layers=remat == "none")
    memory = count_training_memory(
        SMALL[name], compute, OptimizerConfig(), batch_sequences=BATCH, length_tokens=LENGTH
    )
    analysis = compiled_loss(SMALL[name], compute, gradient=True).memory_analysis()
    within += 0.05 if name == "experts" else 0.0  # tokens moved to buffers and back are scratch
    assert memory.temporary == pytest.approx(analysis.temp_size_in_bytes, rel=within)
    assert memory.params + BATCH * LENGTH * 5 * 4 == analysis.argument_size_in_bytes
    assert memory.gradients == pytest.approx(analysis.output_size_in_bytes, abs=4096)


def test_experts_count_by_those_a_token_goes_to():
    """A token meets its own experts, the shared one and the router: FLOPs and active parameters."""
    config = dataclasses.replace(
        SMALL["grouped queries"],
        prefix_layers=("global",),
        cycle_layers=("global_moe",),
        num_experts=8,
        experts_per_token=2,
        expert_mlp_width=96,
        shared_expert_width=64,
    )
    dense = SMALL["grouped queries"]
    one, router = 3 * 256 * 96, 256 * 8
    assert num_params(config) - num_params(dense) == 2 * (
        8 * one + router + 3 * 256 * 64 - 3 * 256 * 768
    )
    assert num_params(config) - num_active_params(config) == 2048 * 256 + 2 * 6 * one
    more = 2 * (2 * one + router + 3 * 256 * 64 - 3 * 256 * 768)
    flops, denses = count_flops(config, 100), count_flops(dense, 100)
    assert flops.projections - denses.projections == 2 * more
    assert (flops.attention, flops.head) == (denses.attention, denses.head)


def test_optimizer_by_hand():
    """AdamW keeps two numbers a parameter and a count; an average one more."""
    config, batch = SMALL["depth"], dict(batch_sequences=1, length_tokens=8)
    four = 4 * num_params(config)
    adamw = count_training_memory(config, PLAIN, OptimizerConfig(), **batch)
    assert (adamw.params, adamw.gradients) == (four, four)
    assert adamw.optimizer == pytest.approx(2 * four, abs=16)
    averaged = count_training_memory(config, PLAIN, OptimizerConfig(ema_decay=0.99), **batch)
    assert averaged.optimizer - adamw.optimizer == four
    muon = count_training_memory(config, PLAIN, OptimizerConfig(name="muon"), **batch)
    matrices = 4 * 12 * config.num_layers * config.width**2
    assert muon.optimizer == pytest.approx(2 * four - matrices, abs=64)
