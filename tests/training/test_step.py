"""The train step: meshes agree, accumulation is invariant, bad steps leave no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, logical_axes
from llm.parallel.config import MESH_AXES, MeshConfig
from llm.parallel.mesh import make_mesh
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import init_state, state_shardings
from llm.training.step import make_train_step

MODEL = TransformerConfig(
    vocab_size=250,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=64,
    max_length_tokens=16,
    tied_head=True,
)
B, T = 8, 16
ONE_DEVICE, ADAMW = MeshConfig(data=1), OptimizerConfig()


def make_batch(step=0):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 250, (B, T)).astype(np.int32)
    segments = np.where(np.arange(T) < rng.integers(4, T, (B, 1)), 1, 2).astype(np.int32)
    weights = (rng.random((B, T)) < 0.8).astype(np.float32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": weights,
        "segment_ids": segments,
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "cursor": np.uint32((step + 1) * B),
    }


@functools.cache
def trainer(mesh_config=ONE_DEVICE, optimizer_config=ADAMW, **kwargs):
    sizes = [getattr(mesh_config, axis) for axis in MESH_AXES]
    mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
    model = Transformer(MODEL, ComputeConfig())
    optimizer = make_optimizer(optimizer_config, logical_axes(model))
    ema = optimizer_config.ema_decay is not None
    step = make_train_step(
        make_causal_lm_loss(model, z_loss=1e-3, tile_tokens=32),
        optimizer,
        optimizer_config,
        make_schedule(ScheduleConfig(warmup_steps=2), total_steps=10, tokens_per_step=B * T),
        state_shardings(model, optimizer, mesh, ema=ema),
        mesh,
        **kwargs,
    )
    return mesh, step, lambda: init_state(model, optimizer, mesh, 0, ema=ema)


def run(steps, *args, state=None, start=0, **kwargs):
    mesh, step, init = trainer(*args, **kwargs)
    losses = []
    with jax.set_mesh(mesh):
        state = init() if state is None else state
        for i in range(start, start + steps):
            state, metrics = step(state, make_batch(i))
            losses.append(float(metrics["train/loss"]))
    return state, losses, metrics


def test_a_mesh_trains_as_one_device_in_float32():
    """All meshes, in float64: tests/parallel/test_meshes.py."""
    state, losses, metrics = run(3, MeshConfig(data=2, fsdp=2, tensor=2))
    reference, reference_losses, reference_metrics = run(3)
    np.testing.assert_allclose(losses, reference_losses, rtol=2e-6)
    np.testing.assert_allclose(
        metrics["train/grad_norm"], reference_metrics["train/grad_norm"], rtol=1e-5
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5),
        state.params,
        reference.params,
    )


def test_accumulation_gives_the_same_step():
    state, losses, _ = run(2, accumulate_steps=4)
    reference, reference_losses, _ = run(2)
    np.testing.assert_allclose(losses, reference_losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, reference.params
    )


def test_the_same_run_twice_is_bitwise_the_same():
    first, _, _ = run(3)
    second, _, _ = run(3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), first, second)


def test_loss_is_a_mean_over_weighted_targets():
    """At the first step the shipped loss equals the mean computed from whole logits."""
    _, losses, metrics = run(1)
    _, _, init = trainer()
    batch = make_batch(0)
    logits = Transformer(MODEL).apply(
        {"params": init().params},
        jnp.asarray(batch["tokens"]),
        segment_ids=jnp.asarray(batch["segment_ids"]),
        positions=jnp.asarray(batch["positions"]),
    )
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    chosen = np.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    expected = -(chosen * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert float(metrics["train/tokens"]) == batch["loss_weights"].sum()


def test_a_step_without_a_finite_gradient_changes_no_parameter():
    mesh, step, init = trainer(optimizer_config=OptimizerConfig(ema_decay=0.9))
    with jax.set_mesh(mesh):
        state, _ = step(init(), make_batch(0))
        before = jax.device_get(state)
        poisoned = make_batch(1)
        poisoned["loss_weights"] = np.full((B, T), np.nan, np.float32)
        state, metrics = step(state, poisoned)
    after = jax.device_get(state)
    for field in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, field), getattr(after, field))
    assert int(after.step) == 2 and int(after.cursor) == 2 * B
    assert int(metrics["train/skipped_in_a_row"]) == 1
    with jax.set_mesh(mesh):
        _, metrics = step(state, make_batch(2))
    assert int(metrics["train/skipped_in_a_row"]) == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_batch_of_padding_changes_nothing_under_momentum_and_decay(name):
    config = OptimizerConfig(name=name, weight_decay=0.1, ema_decay=0.9)
    mesh, step, init = trainer(optimizer_config=config)
    with jax.set_mesh(mesh):
        state, _ = step(init(), make_batch(0))
        before = jax.device_get(state)
        empty = make_batch(1) | {"loss_weights": np.zeros((B, T), np.float32)}
        state, metrics = step(state, empty)
    after = jax.device_get(state)
    for field in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, field), getattr(after, field))
    assert float(metrics["train/loss"]) == 0.0 and int(metrics["train/skipped_in_a_row"]) == 0
    assert int(after.step) == 2 and int(after.cursor) == 2 * B


def test_ema_follows_its_recursion():
    config = OptimizerConfig(ema_decay=0.75)
    _, _, init = trainer(optimizer_config=config)
    expected = np.asarray(init().params["final_norm"]["scale"])
    state = None
    for i in range(3):
        state, _, _ = run(1, optimizer_config=config, state=state, start=i)
        params = np.asarray(state.params["final_norm"]["scale"])
        expected = 0.75 * expected + 0.25 * params
    np.testing.assert_allclose(state.ema_params["final_norm"]["scale"], expected, rtol=1e-6)


def test_a_mesh_that_does_not_divide_the_model_is_named():
    model = Transformer(dataclasses.replace(MODEL, num_kv_heads=1))
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with pytest.raises(ValueError, match="2 ways.*1 along 'kv_heads'"):
        state_shardings(model, make_optimizer(OptimizerConfig(), logical_axes(model)), mesh)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "needs 3 devices but there are 8"),
        (MeshConfig(data=-1, tensor=3), "8 devices are not divisible by 3"),
        (MeshConfig(data=-1, fsdp=-1), "only one axis may be -1"),
        (MeshConfig(data=0), "mesh.data=0"),
    ],
)
def test_impossible_meshes_are_explained(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh)
