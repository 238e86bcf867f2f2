"""Published parameter counts, by shapes alone."""

import math
import re

import jax
import pytest

from llm.models.presets import PRESETS, from_depth
from llm.models.transformer import Transformer, param_shapes
from llm.scaling.accounting import num_active_params, num_params, training_flops_per_token

# Counted on the reference checkpoints of Hugging Face's hub (tied heads counted once). Those with
# experts also by transformers 5.23's classes, made from the config.json; but for DeepSeekMoE's, of
# which there is none.
EXACT = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-moe-16b": 16_375_728_128,
}
# Billions in all and of one token, lookup table counted, as their makers give them.
EXPERTS = {
    # mistral.ai/news/mixtral-of-experts; Jiang et al. 2024, arXiv:2401.04088: 47 and 13
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),  # huggingface.co/Qwen/Qwen3-30B-A3B; the paper gives neither
    "deepseek-moe-16b": (16.4, 2.8),  # Dai et al. 2024, arXiv:2401.06066, section 5.1.2
}
# Names that round by more than 2%: the exact count above is the check.
LOOSE_NAMES = {"gpt2-1.5b", "llama2-7b"}


@pytest.mark.parametrize("name", EXACT)
def test_exact_counts(name):
    assert num_params(PRESETS[name]) == EXACT[name]


@pytest.mark.parametrize("name", EXPERTS)
def test_published_totals_and_active_counts_of_experts(name):
    config, (total, active) = PRESETS[name], EXPERTS[name]
    assert num_params(config) == pytest.approx(total * 1e9, rel=0.003)
    counted = num_active_params(config) + config.vocab_size * config.width
    assert counted == pytest.approx(active * 1e9, rel=0.02)


def test_the_trillion_is_kimi_k2_but_for_its_attention():
    """Moonshot AI 2025, arXiv:2507.20534, table 2: 1.04T parameters in all, 32.6B of one token. Of
    its config.json transformers 5.23's DeepseekV3ForCausalLM, which it is, makes 1.026T."""
    config = PRESETS["moe-1t"]
    d, heads = config.width, config.num_heads
    # queries through a rank of 1,536, keys and values through 512, 64 rotary dimensions a key
    latent = d * 1536 + 1536 + 1536 * heads * 192 + d * (512 + 64) + 512
    latent += 512 * heads * 256 + heads * 128 * d
    ours = 2 * d * heads * 128 + 2 * d * config.num_kv_heads * 128
    more = config.num_layers * (ours - latent)
    assert more == pytest.approx(1.9e9, rel=0.01)
    biases = 60 * 384  # of the choice of experts
    assert num_params(config) - more + biases == 1_026_408_232_448
    active = num_active_params(config) + config.vocab_size * d - more
    assert active == pytest.approx(32.6e9, rel=0.015)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - LOOSE_NAMES - set(EXPERTS) - {"moe-1t"}))
def test_count_is_within_two_percent_of_the_name(name):
    number, unit = re.fullmatch(r".*-([\d.]+)([mb])", name).groups()
    assert num_params(PRESETS[name]) == pytest.approx(
        float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.02
    )


def test_every_preset_is_counted():
    gpt3 = {n for n in PRESETS if n.startswith("gpt3")}
    assert set(EXACT) | gpt3 | {"moe-1t"} == set(PRESETS)


def test_padding_is_allocated_but_not_counted():
    config = PRESETS["gpt2-124m"]
    shapes = param_shapes(Transformer(config))
    allocated = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert shapes["embedder"]["embedding"].shape == (50304, 768)
    assert allocated - num_params(config) == (50304 - 50257) * 768


def test_flops_of_gpt3_by_hand():
    """Brown et al. 2020, table D.1: 6 FLOPs a parameter and token; attention on top."""
    config = PRESETS["gpt3-175b"]
    attention = 12 * 96 * 96 * 128 * 2048 / 2
    without = training_flops_per_token(config, 2048) - attention
    assert without == 6 * num_active_params(config)
    assert num_active_params(config) == num_params(config) - 2048 * 12288
    # 300B tokens: 3.14e23 in the paper
    assert without * 300e9 == pytest.approx(3.14e23, rel=0.002)


def test_depth_dial():
    config = from_depth(12, vocab_size=50257, max_length_tokens=1024)
    assert (config.width, config.num_layers, config.num_heads, config.mlp_width) == (
        768,
        12,
        12,
        3072,
    )
    # attention 4·D², feed-forward 8·D² a layer; norms: 2 of D, 2 of H a layer, one last; tables
    assert num_params(config) == 12 * (12 * 768**2 + 2 * 768 + 2 * 64) + 768 + 2 * 50257 * 768
    with pytest.raises(ValueError, match="multiple of 2"):
        from_depth(3, vocab_size=10, max_length_tokens=8, head_dim=128)
