"""The transformer's invariants: caching, packing, causality, scan = loop, dtype, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models import attention_kernels
from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, init_cache, init_params, logical_axes, param_shapes

BASE = TransformerConfig(
    vocab_size=200,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length_tokens=64,
)
VARIANTS = {
    "rotary": {},
    "qk_norm": dict(qk_norm=True, activation="geglu"),
    "gpt2": dict(
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        attention_bias="all",
        mlp_bias=True,
        tied_head=True,
    ),
    "sinusoidal post-norm": dict(positions="sinusoidal", norm_placement="post", activation="gelu"),
    "alibi": dict(positions="alibi", activation="relu_squared", num_kv_heads=1),
    "local and global": dict(
        cycle_layers=("local", "global"), sliding_window_tokens=5, attention_softcap=2.0
    ),
    "prefix layers": dict(
        num_layers=3,
        prefix_layers=("global",),
        cycle_layers=("local",),
        sliding_window_tokens=4,
        head_softcap=3.0,
    ),
    "scaled rope": dict(rope_scaling="llama3", rope_factor=4.0, rope_original_length_tokens=16),
}


def loud_params(model, seed=0):
    """Parameters large enough for attention to matter: initial ones make every layer faint."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32), param_shapes(model)
    )


def logits_of(model, params, tokens, **kwargs):
    return jax.jit(lambda p, t, k: model.apply({"params": p}, t, **k))(params, tokens, kwargs)


@pytest.fixture(params=VARIANTS)
def model(request):
    return Transformer(dataclasses.replace(BASE, **VARIANTS[request.param]))


def tokens_of(shape, seed=3):
    return jax.random.randint(jax.random.key(seed), shape, 0, BASE.vocab_size)


def test_cached_decoding_equals_the_full_forward(model):
    params, tokens = loud_params(model), tokens_of((2, 14))
    full = logits_of(model, params, tokens)
    cache, parts = init_cache(model.config, 2, 20), []
    apply = jax.jit(lambda t, c: model.apply({"params": params}, t, cache=c))
    for piece in (tokens[:, :6], tokens[:, 6:7], tokens[:, 7:8], tokens[:, 8:]):
        logits, cache = apply(piece, cache)
        parts.append(logits)
    real = slice(0, BASE.vocab_size)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[..., real], full[..., real], atol=1e-5)


def test_packed_documents_equal_separate_ones(model):
    params, tokens = loud_params(model), tokens_of((1, 16))
    segments = jnp.array([[1] * 5 + [2] * 8 + [0] * 3])
    positions = jnp.array([[*range(5), *range(8), 0, 0, 0]])
    packed = logits_of(model, params, tokens, segment_ids=segments, positions=positions)
    first = logits_of(model, params, tokens[:, :5])
    second = logits_of(model, params, tokens[:, 5:13])
    real = slice(0, BASE.vocab_size)
    np.testing.assert_allclose(packed[:, :5, real], first[..., real], atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:13, real], second[..., real], atol=1e-5)


def test_no_logit_depends_on_later_tokens(model):
    params, tokens = loud_params(model), tokens_of((1, 10))
    changed = tokens.at[0, 6].set((tokens[0, 6] + 1) % BASE.vocab_size)
    before, after = logits_of(model, params, jnp.concatenate([tokens, changed]))[:, None]
    assert (before[:, :6] == after[:, :6]).all()
    assert (before[:, 6:] != after[:, 6:])[..., : BASE.vocab_size].any(axis=-1).all()


def loss_and_gradient(config, compute, params, tokens):
    def loss(params):
        logits = Transformer(config, compute).apply({"params": params}, tokens)
        return jnp.sum(jax.nn.log_softmax(logits[..., : BASE.vocab_size])[..., 7])

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_with_no_batch", "attention"])
@pytest.mark.parametrize("unrolled", [True, False])
def test_training_keeps_the_kernel_named_whatever_is_rematerialised(remat, unrolled, monkeypatch):
    """Recomputation once hid that queries and keys begin together, and all went to dense."""
    kernels, params = [], param_shapes(Transformer(BASE))

    def attend_blocked(q, k, v, pattern, softcap):
        kernels.append("blocked")
        return q

    def attend_dense(q, *rest):
        kernels.append("dense")
        return q

    monkeypatch.setattr(attention_kernels, "_attend_dense", attend_dense)
    monkeypatch.setattr(attention_kernels, "_attend_blocked", attend_blocked)
    compute = ComputeConfig(attention_kernel="auto", remat=remat, unroll_layers=unrolled)
    model = Transformer(BASE, compute)
    tokens = jnp.ones((1, 8), jnp.int32)
    jax.eval_shape(jax.grad(lambda p: model.apply({"params": p}, tokens).sum()), params)
    assert set(kernels) == {"blocked"}  # what "auto" takes on a CPU, for whole sequences alone


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_model_for_another_machine_is_made_here(kernel):
    """Initialisation runs no kernel: shapes and axes are needed where there is no such chip."""
    model = Transformer(BASE, ComputeConfig("bfloat16", kernel, remat="attention"))
    assert param_shapes(model) == param_shapes(Transformer(BASE))
    assert jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_with_no_batch", "attention"])
def test_rolled_and_rematerialised_layers_give_the_same_loss_and_gradient(remat):
    config = dataclasses.replace(BASE, **VARIANTS["local and global"])
    with jax.enable_x64(True):
        params = loud_params(Transformer(config))
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        plain = ComputeConfig("float64")
        value, grads = loss_and_gradient(config, plain, params, tokens_of((2, 8)))
        other = ComputeConfig("float64", remat=remat, unroll_layers=remat == "dots")
        other_value, other_grads = loss_and_gradient(config, other, params, tokens_of((2, 8)))
    np.testing.assert_allclose(other_value, value, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), other_grads, grads
    )


def test_padded_vocabulary_is_minus_infinity(model):
    logits = logits_of(model, loud_params(model), tokens_of((1, 3)))
    assert logits.shape == (1, 3, 256) and logits.dtype == jnp.float32
    assert (logits[..., 200:] == -jnp.inf).all() and jnp.isfinite(logits[..., :200]).all()


def test_logical_axes_have_the_rank_of_their_parameters(model):
    axes, shapes = logical_axes(model), param_shapes(model)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda s: len(s.shape), shapes)
    # init gives plain arrays: a vmap over seeds stacks them and changes nothing else
    keys = jax.random.split(jax.random.key(0), 3)
    seeds = jax.eval_shape(jax.vmap(lambda k: init_params(model, k)), keys)
    jax.tree.map(lambda s, x: np.testing.assert_equal(x.shape, (3, *s.shape)), shapes, seeds)


def test_prefix_attention_lets_the_prefix_see_itself_whole():
    model = Transformer(dataclasses.replace(BASE, attention="prefix"))
    params, tokens = loud_params(model), tokens_of((1, 8))
    prefix = jnp.arange(8)[None] < 4
    changed = tokens.at[0, 3].set((tokens[0, 3] + 1) % BASE.vocab_size)
    before, after = (logits_of(model, params, t, prefix=prefix) for t in (tokens, changed))
    assert (before[0, 0, :200] != after[0, 0, :200]).any()


def test_bfloat16_stays_near_float32():
    model = Transformer(dataclasses.replace(BASE, qk_norm=True))
    params, tokens = jax.jit(lambda k: init_params(model, k))(jax.random.key(0)), tokens_of((2, 16))
    low = logits_of(Transformer(model.config, ComputeConfig("bfloat16")), params, tokens)
    full = logits_of(model, params, tokens)
    assert low.dtype == jnp.float32
    scale = float(jnp.std(full[..., :200]))
    assert float(jnp.abs(low - full)[..., :200].max()) < 0.05 * scale


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_kv_heads", 3, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("head_dim", 7, "even head width"),
        ("cycle_layers", ("local",), "sliding_window_tokens"),
        ("cycle_layers", ("global", "global", "global"), "whole cycles of 3"),
        ("width", 0, "model.width=0"),
    ],
)
def test_impossible_shapes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **{field: value})
