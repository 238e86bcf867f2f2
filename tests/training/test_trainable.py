"""What is frozen stays bitwise; rates multiply updates; names are of single layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.adapters import adapt_params, is_factor
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel, at_last_token
from llm.models.transformer import Transformer, init_params, logical_axes, param_shapes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.training.config import OptimizerConfig, ScheduleConfig, TrainableConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import averaged_params, init_state, state_shardings
from llm.training.step import make_train_step
from llm.training.trainable import make_rates, overlay, split

MODEL = TransformerConfig(
    vocab_size=120,
    width=16,
    num_layers=5,
    prefix_layers=("global",),
    cycle_layers=("local", "global"),
    sliding_window_tokens=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=24,
    max_length_tokens=8,
)


def rates_of(config, model=MODEL, **kwargs):
    return make_rates(config, model, param_shapes(Transformer(model)), **kwargs)


def test_names_are_of_single_layers_though_they_are_stacked():
    config = TrainableConfig(freeze=("layers/0/*", "layers/3/attention/*", "embedder/*"))
    rates = rates_of(config)
    assert rates["prefix_0"]["mlp"]["up"]["kernel"] == 0
    assert rates["embedder"]["embedding"] == 0
    assert rates["head"]["kernel"] == 1
    # the cycle's first place holds layers 1 and 3, its second 2 and 4
    query = rates["cycle"]["layer_0"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(query, np.reshape([1, 0], (2, 1, 1, 1)))
    assert rates["cycle"]["layer_0"]["mlp"]["up"]["kernel"] == 1
    assert rates["cycle"]["layer_1"]["attention"]["query"]["kernel"] == 1


def test_layer_decay_counts_from_the_head():
    rates = rates_of(TrainableConfig(layer_decay=0.5, rates={"head/*": 3.0, "*/kernel": 2.0}))
    assert rates["head"]["kernel"] == 6.0
    assert rates["final_norm"]["scale"] == 1.0
    up = lambda place: rates["cycle"][place]["mlp"]["up"]["kernel"].ravel().tolist()  # noqa: E731
    assert up("layer_1") == [2 * 0.5**3, 2 * 0.5]  # layers 2 and 4, the top one
    assert up("layer_0") == [2 * 0.5**4, 2 * 0.5**2]
    assert rates["prefix_0"]["mlp"]["up"]["kernel"] == 2 * 0.5**5
    assert rates["embedder"]["embedding"] == 0.5**6


def test_wrong_patterns_are_told():
    with pytest.raises(ValueError, match="'layer/0/.*' matches no parameter; there are .*layers/"):
        rates_of(TrainableConfig(freeze=("layer/0/attention/query/kernel",)))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        rates_of(TrainableConfig(freeze=("*",)))


def test_with_an_adapter_factors_and_scalar_heads_learn():
    adapter = AdapterConfig(rank=2, quantize="int8")
    shapes = param_shapes(ScalarModel(MODEL, adapter=adapter))
    rates = make_rates(TrainableConfig(), MODEL, shapes, adapted=True)
    learn, frozen = split(shapes, rates)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(learn["trunk"])}
    assert names == {"lora_a", "lora_b"} and set(learn["score"]) == {"kernel", "bias"}
    assert "score" not in frozen
    assert jax.tree.structure(overlay(frozen, learn)) == jax.tree.structure(shapes)


def batch(step):
    random = np.random.default_rng(step)
    tokens = random.integers(0, 120, (4, 8)).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.ones((4, 8), np.float32),
        "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
        "cursor": np.uint32(4 * (step + 1)),
    }


def train(steps, trainable, *, adapter=None, ema=None, **optimizer_changes):
    """Return (parameters before, state after, last metrics)."""
    adapter = adapter or AdapterConfig()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = Transformer(MODEL, ComputeConfig(), adapter)
    config = dataclasses.replace(OptimizerConfig(ema_decay=ema), **optimizer_changes)
    rates = make_rates(trainable, MODEL, param_shapes(model), adapted=adapter.rank > 0)
    optimizer = make_optimizer(config, split(logical_axes(model), rates)[0])
    base = init_params(Transformer(MODEL), jax.random.key(3))
    params = adapt_params(model, base, jax.random.key(4))
    kwargs = dict(ema=ema is not None, rates=rates)
    step = make_train_step(
        make_causal_lm_loss(model),
        optimizer,
        config,
        make_schedule(ScheduleConfig("constant"), total_steps=9, tokens_per_step=32),
        state_shardings(model, optimizer, mesh, **kwargs),
        mesh,
        rates=rates,
    )
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, 0, params=params, **kwargs)
        for i in range(steps):
            state, metrics = step(state, batch(i))
    return params, state, metrics


def changed(before, after):
    return jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, after)


@pytest.mark.parametrize(
    "optimizer",
    [
        "muon",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("adamw", "lion", "adafactor")),
    ],
)
def test_frozen_parameters_stay_bitwise_and_cost_no_optimizer_state(optimizer):
    config = TrainableConfig(freeze=("layers/3/*", "embedder/*"))
    before, state, _ = train(3, config, name=optimizer)
    found = changed(before, state.params)
    assert not found["embedder"]["embedding"] and found["head"]["kernel"]
    place = lambda tree: tree["cycle"]["layer_0"]["mlp"]["up"]["kernel"]  # noqa: E731
    moved = np.abs(np.asarray(place(state.params)) - np.asarray(place(before))).max(axis=(1, 2))
    assert moved[0] > 0 and moved[1] == 0  # layers 1 and 3
    sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
    assert MODEL.padded_vocab_size * MODEL.width == before["head"]["kernel"].size
    assert sizes.count(before["head"]["kernel"].size) <= 2  # the head's, not the embedding's too


def test_rates_scale_the_updates():
    """One step of Adam without decay moves every weight by about the learning rate."""
    config = TrainableConfig(layer_decay=0.5)
    before, state, _ = train(1, config, weight_decay=0.0, learning_rate=1e-3, epsilon=1e-20)
    moved = jax.tree.map(lambda a, b: np.median(np.abs(b - a)), before, state.params)
    np.testing.assert_allclose(moved["head"]["kernel"], 1e-3, rtol=1e-3)
    np.testing.assert_allclose(moved["prefix_0"]["mlp"]["up"]["kernel"], 1e-3 / 32, rtol=1e-2)


@pytest.mark.parametrize(
    "quantize", ["nf4", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("none", "int8"))]
)
def test_an_adapter_trains_its_factors_alone(quantize):
    adapter = AdapterConfig(rank=2, quantize=quantize, block=8)
    before, state, metrics = train(3, TrainableConfig(), adapter=adapter, ema=0.9)
    for path, moved in jax.tree_util.tree_leaves_with_path(changed(before, state.params)):
        assert moved == is_factor(path[-1].key), path
    names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(state.ema_params)}
    assert names == {"lora_a", "lora_b"}
    averaged = averaged_params(state)
    assert jax.tree.structure(averaged) == jax.tree.structure(state.params)
    assert float(metrics["train/loss"]) < np.log(128)


def test_a_reward_is_read_at_the_last_token_whichever_side_is_padded():
    model = ScalarModel(MODEL)
    params = init_params(model, jax.random.key(0))
    assert set(params) == {"trunk", "score"} and "head" not in params["trunk"]
    params["score"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 1))
    params["score"]["bias"] = jnp.array([0.5])
    tokens = jax.random.randint(jax.random.key(2), (5,), 0, 120)

    def reward(left, right):
        row = jnp.pad(tokens, (left, right), constant_values=7)[None]
        real = jnp.pad(jnp.ones(5, jnp.int32), (left, right))[None]
        positions = jnp.maximum(jnp.arange(5 + left + right) - left, 0)[None]
        values = model.apply({"params": params}, row, segment_ids=real, positions=positions)
        return at_last_token(values, real)[0]

    alone = model.apply({"params": params}, tokens[None])[0, -1]
    for left, right in ((0, 3), (3, 0), (1, 2)):
        np.testing.assert_allclose(reward(left, right), alone, rtol=1e-5)
    assert at_last_token(jnp.ones((1, 4)), jnp.zeros((1, 4), jnp.int32))[0] == 0
