"""Adapters against PEFT itself: ours read by it, and its own merged by us."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from llm.interop.huggingface import load_huggingface
from llm.interop.peft import merge_peft, read_peft_config, save_peft
from llm.models.adapters import adapt_params, is_factor
from llm.models.config import AdapterConfig
from llm.models.transformer import Transformer

SHAPE = dict(vocab_size=97, hidden_size=24, intermediate_size=44, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
GPT2 = dict(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=40)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **HEADS, initializer_range=0.2),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, **HEADS, head_dim=8, initializer_range=0.2),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, initializer_range=0.2),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11))


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """A directory with a random model, and the model as transformers has it."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param]())
    theirs.save_pretrained(tmp_path / "base")
    return tmp_path / "base", theirs.eval()


def our_logits(model, params):
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(TOKENS)))(params))[
        ..., :97
    ]


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    "targets", [pytest.param(("query", "out"), marks=pytest.mark.long), AdapterConfig().targets]
)
def test_peft_reads_our_adapter(base, targets, tmp_path):
    directory, theirs = base
    loaded = load_huggingface(directory)
    targets = tuple(t for t in targets if loaded.config.gated or t != "gate")
    model = Transformer(loaded.config, adapter=AdapterConfig(rank=3, alpha=5.0, targets=targets))
    params = adapt_params(model, loaded.params, jax.random.key(0))
    random = np.random.default_rng(1)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            random.normal(0, 0.3, x.shape).astype(np.float32) if is_factor(path[-1].key) else x
        ),
        params,
    )
    save_peft(tmp_path / "adapter", model, params, str(directory))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    expected = their_logits(adapted)
    assert np.abs(expected - our_logits(Transformer(loaded.config), loaded.params)).max() > 0.1
    np.testing.assert_allclose(our_logits(model, params), expected, atol=1e-4, rtol=1e-4)
    merged = merge_peft(tmp_path / "adapter", loaded.config, loaded.params)
    found = our_logits(Transformer(loaded.config), merged)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_we_merge_their_adapter(base, tmp_path):
    directory, theirs = base
    targets = ["c_attn", "c_fc"] if "gpt2" in theirs.config.model_type else ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        init_lora_weights=False,
        rank_pattern={targets[1]: 2},
        alpha_pattern={targets[0]: 10},
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_huggingface(directory)
    merged = merge_peft(tmp_path / "adapter", loaded.config, loaded.params)
    found = our_logits(Transformer(loaded.config), merged)
    np.testing.assert_allclose(found, their_logits(adapted), atol=1e-4, rtol=1e-4)


def test_other_kinds_of_adapters_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    with pytest.raises(ValueError, match="use_dora=True; only plain LoRA"):
        read_peft_config(tmp_path)


def test_a_model_without_factors_is_no_adapter(base, tmp_path):
    loaded = load_huggingface(base[0])
    with pytest.raises(ValueError, match="no low-rank factors: adapter.rank is 0"):
        save_peft(tmp_path / "adapter", Transformer(loaded.config), loaded.params, "base")
