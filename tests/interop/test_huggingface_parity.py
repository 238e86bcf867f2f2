"""Models of ours against transformers on the same files: logits, loss, every gradient, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import (
    load_balancing_loss_func as mixtral_balance,
)

from llm.interop.families import FAMILIES, config_from_huggingface, family_of
from llm.interop.huggingface import load_huggingface, save_huggingface
from llm.interop.layout import read_param, tensors
from llm.models.config import ComputeConfig
from llm.models.router import gather_sums
from llm.models.transformer import Transformer
from llm.objectives.router import load_balance_loss, router_z_loss

SHAPE = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
GPT2_SHAPE = dict(vocab_size=101, n_embd=24, n_layer=2, n_head=3, n_positions=40)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=500.0, factor=4.0)


def gpt2(**options):
    return transformers.GPT2Config(**GPT2_SHAPE, initializer_range=0.2, **options)


def llama(num_heads, num_kv_heads, **options):
    heads = dict(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads)
    return transformers.LlamaConfig(**SHAPE, **heads, **options)


def qwen3(num_heads, num_kv_heads, **options):
    heads = dict(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads)
    return transformers.Qwen3Config(**SHAPE | heads | options)


def mixtral(**options):
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=5)
    return transformers.MixtralConfig(**SHAPE | heads | options)


def qwen3_moe(**options):
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    experts = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12)
    return transformers.Qwen3MoeConfig(**SHAPE | heads | experts | options)


CASES = {
    "gpt2": lambda: gpt2(),
    "gpt2-untied-gelu": lambda: gpt2(activation_function="gelu", tie_word_embeddings=False),
    "gpt2-relu2-narrow": lambda: gpt2(activation_function="relu2", n_inner=40),
    "llama-gqa": lambda: llama(4, 2),
    "llama-mqa-tied-biases": lambda: llama(
        3, 1, head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-rope-llama3": lambda: llama(2, 2, rope_parameters=LLAMA3_ROPE),
    "llama-rope-linear-geglu": lambda: llama(
        6, 3, rope_parameters=LINEAR_ROPE, hidden_act="gelu_pytorch_tanh"
    ),
    "qwen3-tied": lambda: qwen3(4, 2, head_dim=8, tie_word_embeddings=True),
    "qwen3-windows-biases": lambda: qwen3(
        5,
        1,
        head_dim=6,
        num_hidden_layers=4,  # ours: one full layer, then a cycle of one
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "apertus-relu2": lambda: transformers.ApertusConfig(
        **SHAPE,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="relu2",
        pad_token_id=None,  # transformers gives the row of padding no gradient
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
    ),
    "mixtral": lambda: mixtral(),
    "mixtral-window-tied": lambda: mixtral(
        num_local_experts=3, sliding_window=7, tie_word_embeddings=True
    ),
    "qwen3-moe": lambda: qwen3_moe(),
    "qwen3-moe-dense-first": lambda: qwen3_moe(
        num_hidden_layers=3, mlp_only_layers=[0], norm_topk_prob=True, attention_bias=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2
    ),
}


@pytest.fixture(scope="module", params=CASES)
def reference(request, tmp_path_factory):
    """A random transformers model, its directory, tokens, and its logits on them."""
    torch.manual_seed(sum(map(ord, request.param)))
    config = CASES[request.param]()
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases would else start at 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tokens = torch.randint(0, config.vocab_size, (2, 36))
    return model, directory, tokens


def mean_loss(model, params, tokens):
    logits = model.apply({"params": params}, tokens)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()
    return loss, logits


def test_logits_loss_and_every_gradient_agree(reference):
    torch_model, directory, tokens = reference
    checkpoint = load_huggingface(directory)
    model = Transformer(checkpoint.config, ComputeConfig(unroll_layers=False))
    step = jax.jit(jax.value_and_grad(lambda p, t: mean_loss(model, p, t), has_aux=True))
    (loss, logits), grads = step(checkpoint.params, jnp.asarray(tokens.numpy()))

    torch_model.zero_grad()
    out = torch_model(tokens, labels=tokens)
    out.loss.backward()
    vocab = checkpoint.config.vocab_size
    np.testing.assert_allclose(logits[..., :vocab], out.logits.detach(), atol=1e-4, rtol=0)
    assert np.isneginf(logits[..., vocab:]).all() and logits.shape[-1] == 128
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)

    theirs = dict(
        pair
        for name, p in torch_model.named_parameters()
        for pair in as_on_disk(name, p.grad.numpy(), torch_model.config.model_type)
    )
    rows = FAMILIES[torch_model.config.model_type].rows
    ours = {
        t.name: read_param(t, checkpoint.config, grads) for t in tensors(rows, checkpoint.config)
    }
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # relative to the largest: a key's bias in GPT-2 has no true gradient, just noise
        error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.2e}"


def as_on_disk(name, array, model_type):
    """Yield tensors as files have them: transformers 5 holds experts side by side in memory."""
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
        names = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    module, _, last = name.rpartition(".")
    if not module.endswith(".experts"):
        yield name, array
        return
    for expert, fused in enumerate(array):
        parts = np.split(fused, len(names[last]))
        for part_name, part in zip(names[last], parts, strict=True):
            yield f"{module}.{expert}.{part_name}.weight", part


@pytest.mark.parametrize("name", [name for name in CASES if "moe" in name or "mixtral" in name])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_is_transformers_auxiliary_loss(name, padded, tmp_path):
    """Theirs pools the layers' sums before the product, ours takes it a layer: of each layer both
    are the same, and of the sums pooled."""
    torch.manual_seed(0)
    config = CASES[name]()
    torch_model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch_model.save_pretrained(tmp_path)
    checkpoint = load_huggingface(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (3, 20))
    mask = torch.ones_like(tokens)
    mask[:, 13:] = 0 if padded else 1
    out = torch_model(tokens, attention_mask=mask, output_router_logits=True)
    _, variables = Transformer(checkpoint.config).apply(
        {"params": checkpoint.params},
        jnp.asarray(tokens.numpy()),
        segment_ids=jnp.asarray(mask.numpy()),
        mutable=["router"],
    )
    sums = gather_sums(variables)
    pooled = jax.tree.map(lambda x: jnp.sum(x, axis=0, keepdims=True), sums)
    k = checkpoint.config.experts_per_token
    count = checkpoint.config.num_experts
    aux = load_balance_loss(pooled.counts, pooled.scores, pooled.tokens)
    assert float(aux) == pytest.approx(out.aux_loss.item(), rel=1e-5)
    theirs = [mixtral_balance((logits,), count, k, mask).item() for logits in out.router_logits]
    assert len(theirs) == checkpoint.config.moe_layers
    ours = load_balance_loss(sums.counts, sums.scores, sums.tokens)
    assert float(ours) == pytest.approx(np.mean(theirs), rel=1e-5)
    logits = torch.stack(out.router_logits).detach().numpy()[:, mask.numpy().ravel() > 0]
    expected = np.mean(np.log(np.sum(np.exp(logits), axis=-1)) ** 2)
    assert float(router_z_loss(sums.squared_log_z, sums.tokens)) == pytest.approx(expected, 1e-4)


def test_export_loads_in_transformers_with_the_same_logits(reference, tmp_path):
    torch_model, directory, tokens = reference
    checkpoint = load_huggingface(directory)
    assert family_of(checkpoint.config) == torch_model.config.model_type
    save_huggingface(tmp_path / "whole", checkpoint.config, checkpoint.params)
    save_huggingface(
        tmp_path / "shards", checkpoint.config, checkpoint.params, max_shard_bytes=9_000
    )
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    with torch.no_grad():
        expected = torch_model(tokens).logits
        for name in ("whole", "shards"):
            back, info = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / name, attn_implementation="eager", output_loading_info=True
            )
            assert not info["missing_keys"] and not info["unexpected_keys"]
            assert type(back) is type(torch_model)
            torch.testing.assert_close(back(tokens).logits, expected, atol=0, rtol=0)

    again = load_huggingface(tmp_path / "shards")
    assert again.config == checkpoint.config
    jax.tree.map(np.testing.assert_array_equal, again.params, checkpoint.params)


def test_shards_written_by_transformers_load(reference, tmp_path):
    torch_model, directory, _ = reference
    torch_model.save_pretrained(tmp_path, max_shard_size="9KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    whole, shards = load_huggingface(directory), load_huggingface(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole.params, shards.params)


@pytest.mark.parametrize("name", [name for name in CASES if name[:4] in ("llam", "qwen")])
def test_both_spellings_of_rotary_settings_mean_the_same(name):
    theirs = CASES[name]().to_dict()
    expected = config_from_huggingface(theirs)
    rope = theirs.pop("rope_parameters")
    theirs["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    theirs["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert config_from_huggingface(theirs) == expected
