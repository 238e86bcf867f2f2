"""muP: flat activations in width where the standard parametrisation's grow; nothing at the base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, logical_axes
from llm.models.transformer import init_params as init_params_eagerly
from llm.scaling.coordinates import coordinate_check, growth_exponent
from llm.training.config import OptimizerConfig
from llm.training.optimizers import make_optimizer

WIDTHS = (32, 128)
OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=1e-2),
    "muon": OptimizerConfig(name="muon", learning_rate=2e-2, adam_learning_rate=6e-3),
}


def init_params(model, key):
    return jax.jit(functools.partial(init_params_eagerly, model))(key)


def wide(width: int, **changes) -> TransformerConfig:
    shape = dict(
        vocab_size=64,
        width=width,
        num_layers=1,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
        mlp_width=4 * width,
        max_length_tokens=16,
        activation="relu_squared",
        initializer="fan_in",
    )
    return TransformerConfig(**(shape | changes))


@functools.cache
def growth(optimizer: str, base: int | None) -> dict[str, float]:
    changes = coordinate_check(
        [wide(width, mup_base_width=base) for width in WIDTHS],
        OPTIMIZERS[optimizer],
        seeds=(0, 1),
        length_tokens=16,
    )
    return {name: growth_exponent(WIDTHS, sizes) for name, sizes in changes.items()}


def is_flat(exponents: dict[str, float]) -> bool:
    return all(abs(exponent) < 0.25 for exponent in exponents.values())


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_activations_are_flat_in_width(optimizer):
    exponents = growth(optimizer, 32)
    assert set(exponents) == {"attention", "feed-forward", "residual", "logits"}
    assert is_flat(exponents), exponents


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_the_standard_parametrisation_fails_the_same_check(optimizer):
    assert not is_flat(growth(optimizer, None)), growth(optimizer, None)


@pytest.mark.parametrize("initializer, tied", [("gpt2", True), ("fan_in", False)])
def test_at_its_base_it_changes_nothing(initializer, tied):
    standard = wide(64, initializer=initializer, tied_head=tied)
    ours = dataclasses.replace(standard, mup_base_width=64)
    key, tokens = jax.random.key(0), jnp.arange(16)[None]
    params = [init_params(Transformer(config), key) for config in (standard, ours)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    logits = [Transformer(c).apply({"params": params[0]}, tokens) for c in (standard, ours)]
    np.testing.assert_array_equal(*logits)
    axes = logical_axes(Transformer(ours))
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size).reshape(x.shape)), params[0])
    updates = []
    for ratio in (None, ours.width_ratio):
        tx = make_optimizer(OPTIMIZERS["adamw"], axes, width_ratio=ratio)
        updates.append(tx.update(grads, tx.init(params[0]), params[0])[0])
    jax.tree.map(np.testing.assert_array_equal, *updates)


@pytest.mark.parametrize("initializer", ["gpt2", "fan_in"])
def test_table_8(initializer):
    """Yang et al. 2022, table 8, at 8 times the base: what each kind of parameter begins with."""
    base, config = (
        wide(width, mup_base_width=32, initializer=initializer, vocab_size=4096)
        for width in (32, 256)
    )
    model = Transformer(config)
    std = [
        jax.tree.map(lambda x: float(jnp.std(x)), init_params(Transformer(c), jax.random.key(1)))
        for c in (base, config)
    ]
    for path, ratio in {
        ("embedder", "embedding"): 1.0,
        ("head", "kernel"): 1.0,
        ("cycle", "layer_0", "attention", "query", "kernel"): 8**-0.5,
        ("cycle", "layer_0", "mlp", "up", "kernel"): 8**-0.5,
    }.items():
        small, large = (functools.reduce(lambda tree, name: tree[name], path, s) for s in std)
        assert large / small == pytest.approx(ratio, rel=0.06), path

    # Adam's updates of matrices are an eighth, of all else the base's; decay is the same of all.
    params = init_params(model, jax.random.key(1))
    tx = make_optimizer(
        OptimizerConfig(weight_decay=0.0), logical_axes(model), width_ratio=config.width_ratio
    )
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    layer = updates["cycle"]["layer_0"]
    for matrix in (layer["attention"]["query"], layer["attention"]["out"], layer["mlp"]["down"]):
        np.testing.assert_allclose(matrix["kernel"], -1 / 8, rtol=1e-4)
    for whole in (updates["head"]["kernel"], updates["embedder"]["embedding"]):
        np.testing.assert_allclose(whole, -1.0, rtol=1e-4)
    np.testing.assert_allclose(layer["mlp_norm"]["scale"], -1.0, rtol=1e-4)
    decaying = make_optimizer(
        OptimizerConfig(weight_decay=0.5), logical_axes(model), width_ratio=config.width_ratio
    )
    decayed, _ = decaying.update(grads, decaying.init(params), params)
    name = ("cycle", "layer_0", "mlp", "up", "kernel")
    new, old, param = (
        functools.reduce(lambda t, n: t[n], name, tree) for tree in (decayed, updates, params)
    )
    np.testing.assert_allclose(new - old, -0.5 * param, atol=1e-6)


def test_muons_updates_have_the_spectral_norm():
    """sqrt(fan out / fan in), for matrices that widen and for those that narrow."""
    config = wide(64, mup_base_width=32)
    model = Transformer(config)
    params = init_params(model, jax.random.key(0))
    tx = make_optimizer(
        dataclasses.replace(OPTIMIZERS["muon"], weight_decay=0.0),
        logical_axes(model),
        width_ratio=config.width_ratio,
    )
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    mlp = updates["cycle"]["layer_0"]["mlp"]
    for name, norm in (("up", 2.0), ("down", 0.5)):
        largest = np.linalg.norm(np.asarray(mlp[name]["kernel"][0]), 2)
        # five Newton-Schulz steps bring singular values to between 0.7 and 1.2
        assert 0.65 * norm < largest < 1.3 * norm, (name, largest)


def test_the_head_is_divided_and_attention_goes_as_one_over_its_width():
    plain = wide(64, head_dim=32, num_heads=2, num_kv_heads=2)
    ours = dataclasses.replace(plain, mup_base_width=32, mup_base_head_dim=8)
    params = init_params(Transformer(plain), jax.random.key(0))
    layer = params["cycle"]["layer_0"]
    noise = jax.random.normal(jax.random.key(1), layer["attention"]["out"]["kernel"].shape)
    layer["attention"]["out"]["kernel"] = noise / 8  # zero at first: attention would not show
    tokens = jnp.arange(16)[None]
    logits = Transformer(ours, ComputeConfig()).apply({"params": params}, tokens)
    # 1/H where 1/sqrt(H) was, equal at H = 8: queries times sqrt(8 / 32)
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x / 2 if "query" in jax.tree_util.keystr(path) else x, params
    )
    expected = Transformer(plain).apply({"params": scaled}, tokens) / 2
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=1e-6)
