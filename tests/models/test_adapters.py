"""LoRA and QLoRA: the adapted model against the same model with its factors multiplied out."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.generation.config import SamplingConfig
from llm.generation.decode import make_generate
from llm.models.adapters import adapt_params, is_factor, merge_params
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.quantization import dequantize_kernel, quantize_kernel, stored_shapes
from llm.models.transformer import Transformer, init_cache, init_params

CONFIG = TransformerConfig(
    vocab_size=60,
    width=32,
    num_layers=3,
    prefix_layers=("global",),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length_tokens=32,
    attention_bias="qkv",
    vocab_multiple=4,
)
TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, CONFIG.vocab_size)
QUICK = [(True, "none", "none"), (False, "full", "nf4")]
EVERY = [
    pytest.param(
        unroll,
        remat,
        quantize,
        id=f"{'unrolled' if unroll else 'scanned'}-{remat}-{quantize}",
        # nf4 is the harder case, and scanned layers with all recomputed the harder program
        marks=[] if (unroll, remat, quantize) in QUICK else [pytest.mark.long],
    )
    for unroll, remat, quantize in itertools.product(
        (True, False), ("none", "full"), ("none", "int8", "nf4")
    )
]


def base_params(config=CONFIG):
    """Parameters large enough for attention to be sharp."""
    shapes = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32), shapes)


def adapted(unroll, remat, quantize, config=CONFIG, **changes):
    """Return (adapted model, its parameters with factors that matter)."""
    adapter = AdapterConfig(rank=3, alpha=6.0, quantize=quantize, block=16, **changes)
    compute = ComputeConfig(unroll_layers=unroll, remat=remat)
    model = Transformer(config, compute, adapter)
    params = adapt_params(model, base_params(config), jax.random.key(1))
    random = np.random.default_rng(2)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            jnp.asarray(random.normal(0, 0.2, x.shape), jnp.float32)
            if is_factor(path[-1].key)
            else x
        ),
        params,
    )
    return model, params


def plain(model):
    return Transformer(CONFIG, ComputeConfig(), AdapterConfig())


def logits_of(model, params, tokens=TOKENS, **kwargs):
    return jax.jit(lambda p, t: model.apply({"params": p}, t, **kwargs))(params, tokens)


def test_fresh_factors_leave_the_model_as_it_was():
    adapter = AdapterConfig(rank=4)
    model = Transformer(CONFIG, adapter=adapter)
    params = adapt_params(model, base_params(), jax.random.key(1))
    factors = [x for p, x in jax.tree_util.tree_leaves_with_path(params) if is_factor(p[-1].key)]
    assert len(factors) == 2 * 7 * 2  # a and b, of 7 kernels, in the prefix layer and in the cycle
    np.testing.assert_array_equal(logits_of(model, params), logits_of(plain(model), base_params()))


@pytest.mark.parametrize("unroll, remat, quantize", EVERY)
def test_merged_is_adapted_with_the_same_gradients(unroll, remat, quantize):
    """The factors' gradients are the merged kernels' by the chain rule, taken in NumPy."""
    model, params = adapted(unroll, remat, quantize)
    merged = merge_params(model, params)
    real = slice(0, CONFIG.vocab_size)
    np.testing.assert_allclose(
        logits_of(model, params)[..., real],
        logits_of(plain(model), merged)[..., real],
        rtol=1e-4,
        atol=1e-4,
    )

    def loss(model, params):
        logits = model.apply({"params": params}, TOKENS)[..., real]
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 7])

    whole = jax.jit(jax.grad(lambda p: loss(plain(model), p)))(merged)

    def of_factors(factors):
        return loss(model, replace_factors(params, factors))

    factors = {p: x for p, x in by_path(params).items() if is_factor(p[-1])}
    found = jax.jit(jax.grad(of_factors))(factors)
    for path in factors:
        if path[-1] != "lora_a":
            continue
        *parent, _ = path
        kernel = np.asarray(by_path(whole)[(*parent, "kernel")], np.float64)
        a = np.asarray(factors[path], np.float64)
        b = np.asarray(factors[(*parent, "lora_b")], np.float64)
        stacked = parent[0] == "cycle"
        layers = range(len(a)) if stacked else [None]
        for layer in layers:
            g, a_l, b_l = (x if layer is None else x[layer] for x in (kernel, a, b))
            inputs = a_l.shape[:-1]
            flat = g.reshape(int(np.prod(inputs)), -1)
            expected_a = 2.0 * flat @ b_l.reshape(3, -1).T
            expected_b = 2.0 * a_l.reshape(-1, 3).T @ flat
            got_a = found[path] if layer is None else found[path][layer]
            got_b = found[(*parent, "lora_b")]
            got_b = got_b if layer is None else got_b[layer]
            scale = np.abs(expected_a).max() + np.abs(expected_b).max()
            np.testing.assert_allclose(
                got_a.reshape(-1, 3), expected_a, rtol=1e-3, atol=1e-5 * scale
            )
            np.testing.assert_allclose(
                got_b.reshape(3, -1), expected_b, rtol=1e-3, atol=1e-5 * scale
            )


@pytest.mark.parametrize("unroll, remat, quantize", EVERY)
def test_decoding_equals_the_full_forward_and_the_merged_model(unroll, remat, quantize):
    model, params = adapted(unroll, remat, quantize)
    full = logits_of(model, params)
    cache, parts = init_cache(CONFIG, 2, 12), []
    apply = jax.jit(lambda p, t, c: model.apply({"params": p}, t, cache=c))
    for piece in (TOKENS[:, :7], TOKENS[:, 7:8], TOKENS[:, 8:]):
        logits, cache = apply(params, piece, cache)
        parts.append(logits)
    real = slice(0, CONFIG.vocab_size)
    np.testing.assert_allclose(
        jnp.concatenate(parts, 1)[..., real], full[..., real], rtol=1e-4, atol=1e-4
    )
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.0)
    arguments = (TOKENS, jnp.full(2, 12), jax.random.split(jax.random.key(0), 2))
    ours = make_generate(model, sampling)(params, *arguments)
    merged = make_generate(plain(model), sampling)(merge_params(model, params), *arguments)
    np.testing.assert_array_equal(ours.tokens, merged.tokens)
    np.testing.assert_allclose(ours.log_probs, merged.log_probs, atol=1e-4)


# Small: there are many of them. What is rematerialised must change nothing but the memory.
SMALL = dataclasses.replace(
    CONFIG, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=16
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "unroll, quantize",
    [
        pytest.param(
            unroll,
            quantize,
            id=f"{'unrolled' if unroll else 'scanned'}-{quantize}",
            marks=[] if (unroll, quantize) == (False, "nf4") else [pytest.mark.long],
        )
        for unroll, quantize in itertools.product((True, False), ("none", "int8", "nf4"))
    ],
)
def test_every_remat_policy_trains_and_decodes_as_none(unroll, quantize):
    """Losses, the factors' gradients, and greedy texts; those of "none" are merged ones above."""
    found = {}
    for remat in ("none", "dots", "dots_with_no_batch", "attention"):
        model, params = adapted(unroll, remat, quantize, config=SMALL)
        factors = {p: x for p, x in by_path(params).items() if is_factor(p[-1])}

        def loss(factors, model=model, params=params):
            logits = model.apply({"params": replace_factors(params, factors)}, TOKENS)
            return -jnp.mean(jax.nn.log_softmax(logits[..., : CONFIG.vocab_size])[:, :-1, 7])

        value, grads = jax.jit(jax.value_and_grad(loss))(factors)
        sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
        arguments = (TOKENS[:, :6], jnp.full(2, 6), jax.random.split(jax.random.key(0), 2))
        texts = make_generate(model, sampling)(params, *arguments)
        found[remat] = (value, grads, texts.tokens, texts.log_probs)
    for remat, values in found.items():
        for ours, theirs in zip(*map(jax.tree.leaves, (values, found["none"])), strict=True):
            atol = 1e-6 * float(jnp.max(jnp.abs(theirs)))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol, err_msg=remat)


def test_only_targets_get_factors_and_all_kernels_of_layers_are_stored():
    model, params = adapted(True, "none", "nf4", targets=("query", "value"))
    names = {p[-2] for p in by_path(params) if is_factor(p[-1])}
    assert names == {"query", "value"}
    stored = {p[-2] for p in by_path(params) if p[-1] == "kernel_nf4"}
    assert stored == {"query", "key", "value", "out", "up", "gate", "down"}
    kernels = {p[-2] for p in by_path(params) if p[-1] == "kernel"}
    assert kernels == {"head"}


# The 16 values of 4-bit NormalFloat: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


def test_nf4_is_the_nearest_of_the_published_values_in_each_block():
    kernel = jax.random.normal(jax.random.key(0), (64, 6)) * jnp.geomspace(0.1, 10, 6)
    adapter = AdapterConfig(quantize="nf4", block=16)
    stored = quantize_kernel(kernel, stored_shapes(adapter, kernel.shape, 0, 1))
    assert stored["kernel_nf4"].shape == (64, 3) and stored["kernel_nf4"].dtype == jnp.uint8
    blocks = np.asarray(kernel, np.float64).reshape(4, 16, 6)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = NF4[np.abs(blocks[..., None] / largest[..., None] - NF4).argmin(-1)]
    expected = (nearest * largest).reshape(64, 6)
    np.testing.assert_allclose(dequantize_kernel(stored), expected, rtol=1e-5, atol=1e-6)


def test_int8_errs_by_half_a_step_of_each_output():
    kernel = jax.random.normal(jax.random.key(0), (4, 8, 10)) * jnp.geomspace(0.01, 100, 10)
    stored = quantize_kernel(
        kernel, stored_shapes(AdapterConfig(quantize="int8"), (4, 8, 10), 0, 2)
    )
    step = np.abs(kernel).max(axis=(0, 1)) / 127
    error = np.abs(dequantize_kernel(stored) - kernel).max(axis=(0, 1))
    assert (error <= 0.51 * step).all() and (error > 0.1 * step).all()


def test_a_config_that_learns_nothing_or_names_no_kernel_is_refused():
    with pytest.raises(ValueError, match="targets is empty"):
        AdapterConfig(rank=2, targets=())
    with pytest.raises(ValueError, match="'querry'.*query, key"):
        AdapterConfig(rank=2, targets=("querry",))
    odd = dataclasses.replace(CONFIG, mlp_width=49)
    with pytest.raises(ValueError, match="49 outputs are odd"):
        init_params(Transformer(odd, adapter=AdapterConfig(quantize="nf4")), jax.random.key(0))


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(entry.key for entry in path): x for path, x in leaves}


def replace_factors(params, factors):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: factors.get(tuple(entry.key for entry in path), x), params
    )
