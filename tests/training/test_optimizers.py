"""Optimizers on stacked layers equal optimizers on each layer; schedules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.models.unstack import unstack, unstacked
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.optimizers import make_optimizer, muon_dimensions
from llm.training.schedules import make_schedule

MODEL = Transformer(
    TransformerConfig(
        vocab_size=128,
        width=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_width=160,  # wide enough for Adafactor to factor it
        max_length_tokens=16,
        attention_bias="all",
    )
)


def random_like(params, seed):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_update_on_stacked_parameters_equals_the_per_layer_ones(name):
    config = OptimizerConfig(name=name, learning_rate=0.01)
    params = random_like(init_params(MODEL, jax.random.key(0)), 1)
    flat_params = unstack(MODEL, params)
    optimizer = make_optimizer(config, logical_axes(MODEL))
    state = optimizer.init(params)
    # the per-layer side: no "cycle" subtree, every layer's arrays apart
    axes = logical_axes(unstacked(MODEL))
    per_layer = make_optimizer(config, {name: axes[name] for name in flat_params})
    flat_state = per_layer.init(flat_params)
    for seed in (2, 3):
        grads = random_like(params, seed)
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        flat_grads = unstack(MODEL, grads)
        flat_updates, flat_state = jax.jit(per_layer.update)(flat_grads, flat_state, flat_params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        unstack(MODEL, updates),
        flat_updates,
    )


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_update_on_stacked_experts_equals_that_on_each_matrix(name):
    """Whatever lies in front of a matrix, layers or experts, is no part of it."""
    optimizer = OptimizerConfig(name=name, learning_rate=0.01)
    random = np.random.default_rng(0)
    stacked, *grads = (random.normal(size=(2, 3, 130, 140)).astype(np.float32) for _ in range(3))
    matrix = ("embed", "expert_mlp")
    whole = make_optimizer(optimizer, {"kernel": ("layers", "experts", *matrix)})
    places = [(layer, expert) for layer in range(2) for expert in range(3)]
    apart = make_optimizer(optimizer, {str(at): {"kernel": matrix} for at in places})
    split = lambda x: {str(at): {"kernel": x[at]} for at in places}  # noqa: E731
    state, states = whole.init({"kernel": stacked}), apart.init(split(stacked))
    for grad in grads:
        update, state = jax.jit(whole.update)({"kernel": grad}, state, {"kernel": stacked})
        updates, states = jax.jit(apart.update)(split(grad), states, split(stacked))
    for at in places:
        np.testing.assert_allclose(update["kernel"][at], updates[str(at)]["kernel"], atol=2e-5)


def test_muon_leaves_routers_to_adamw():
    config = dataclasses.replace(
        MODEL.config,
        cycle_layers=("global_moe",),
        num_experts=4,
        experts_per_token=2,
        expert_mlp_width=8,
    )
    mlp = muon_dimensions(logical_axes(Transformer(config)))["cycle"]["layer_0"]["mlp"]
    assert mlp["router"]["scores"]["kernel"] is None
    assert tuple(mlp["experts"]["up"]["kernel"]) == ((2,), (3,))
    assert tuple(mlp["experts"]["down"]["kernel"]) == ((2,), (3,))


def test_muon_takes_the_matrices_inside_layers_and_nothing_else():
    dimensions = muon_dimensions(logical_axes(MODEL))
    layer = dimensions["cycle"]["layer_0"]
    assert tuple(layer["attention"]["query"]["kernel"]) == ((1,), (2, 3))
    assert tuple(layer["attention"]["out"]["kernel"]) == ((1, 2), (3,))
    assert tuple(layer["mlp"]["down"]["kernel"]) == ((1,), (2,))
    assert layer["attention"]["query"]["bias"] is None
    assert layer["mlp_norm"]["scale"] is None
    assert dimensions["embedder"]["embedding"] is None and dimensions["head"]["kernel"] is None


def test_muon_updates_are_near_orthogonal():
    """Jordan 2024: five Newton-Schulz steps bring every singular value to about 0.7 … 1.2."""
    config = OptimizerConfig(name="muon", weight_decay=0.0)
    params = init_params(MODEL, jax.random.key(0))
    optimizer = make_optimizer(config, logical_axes(MODEL))
    updates, _ = optimizer.update(random_like(params, 5), optimizer.init(params), params)
    kernel = updates["cycle"]["layer_0"]["mlp"]["up"]["kernel"]  # (3, 32, 160)
    values = np.linalg.svd(np.asarray(kernel), compute_uv=False) / (160 / 32) ** 0.5
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_decay_shrinks_kernels_and_leaves_norms_and_biases(name):
    """With no gradient an update is −weight_decay · parameter, where it decays."""
    config = OptimizerConfig(name=name, weight_decay=0.1, decay_embeddings=False)
    params = random_like(init_params(MODEL, jax.random.key(0)), 1)
    optimizer = make_optimizer(config, logical_axes(MODEL))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        param = params
        for entry in path:
            param = param[entry.key]
        ratio = -0.1 if path[-1].key == "kernel" else 0.0
        if name == "muon" and path[0].key == "head":
            ratio *= config.adam_learning_rate / config.learning_rate  # AdamW's own peak
        np.testing.assert_allclose(update, ratio * param, atol=1e-6, err_msg=str(path))


def test_adamw_is_optax_with_the_mask():
    """One known step: Adam's first update is −g/(|g| + ε) whatever the betas."""
    params = init_params(MODEL, jax.random.key(0))
    config = OptimizerConfig(weight_decay=0.0)
    optimizer = make_optimizer(config, logical_axes(MODEL))
    grads = random_like(params, 1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -g / (jnp.abs(g) + 1e-8), rtol=1e-4),
        updates,
        grads,
    )


def fractions(name, steps=10, tokens_per_step=1, **fields):
    schedule = make_schedule(
        ScheduleConfig(name=name, **fields), total_steps=steps, tokens_per_step=tokens_per_step
    )
    return [round(float(schedule(step)), 4) for step in range(steps)]


def test_schedules_by_hand():
    assert fractions("constant", 4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert fractions("linear", 6, warmup_steps=2, final_fraction=0.2) == [0.5, 1, 1, 0.8, 0.6, 0.4]
    assert fractions("cosine", 4, final_fraction=0.0) == [1.0, 0.8536, 0.5, 0.1464]
    stable = fractions("warmup_stable_decay", 8, warmup_steps=2, decay_steps=4, final_fraction=0.0)
    assert stable == [
        0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25,
    ]  # fmt: skip
    assert fractions("inverse_sqrt", 9, warmup_steps=3)[3:] == [
        1.0, 0.866, 0.7746, 0.7071, 0.6547, 0.6124,
    ]  # fmt: skip


def test_tokens_and_steps_mean_the_same():
    by_tokens = fractions("cosine", 20, tokens_per_step=100, warmup_tokens=450)
    assert by_tokens == fractions("cosine", 20, warmup_steps=5)


def test_schedule_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=8 and decay_steps=4 .* exceed the run's 10"):
        fractions("warmup_stable_decay", 10, warmup_steps=8, decay_steps=4)


def test_clip_is_not_the_optimizers():
    assert dataclasses.replace(OptimizerConfig(), clip_norm=None).clip_norm is None
    assert optax.tree.norm({"a": jnp.array([3.0, 4.0])}) == 5.0
