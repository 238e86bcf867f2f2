"""Many runs in one program: each member is its own single run."""

import functools

import jax
import numpy as np
import pytest

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.training.ahead import chip_memory
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.members import Member, MemberRuns, member_of, members_mesh
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import init_state, state_shardings
from llm.training.step import make_train_step

STEPS, B, T, VOCAB = 20, 4, 16, 61
MODEL = Transformer(
    TransformerConfig(
        vocab_size=VOCAB,
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=64,
        max_length_tokens=T,
        dropout_rate=0.1,
    ),
    ComputeConfig(),
)
MEMBERS = (
    Member(learning_rate=1e-2, weight_decay=0.1),
    Member(learning_rate=1e-2, weight_decay=0.1, seed=1),
    Member(learning_rate=3e-3, weight_decay=0.1, seed=1),
    Member(learning_rate=1e-2, weight_decay=1.0),
    Member(learning_rate=1e-2, weight_decay=0.1, init_scale=0.5),
    Member(learning_rate=1e-2, weight_decay=0.1, data_seed=7),
)
SCHEDULE = make_schedule(ScheduleConfig(warmup_steps=3), total_steps=STEPS, tokens_per_step=B * T)
LOSS = make_causal_lm_loss(MODEL)


def make_batch(data_seed: int, step: int) -> dict:
    tokens = np.random.default_rng([data_seed, step]).integers(0, VOCAB, (B, T + 1))
    tokens = np.minimum(tokens, tokens[:, :1]).astype(np.int32)  # something to learn
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((B, T), np.float32),
        "segment_ids": np.ones((B, T), np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "cursor": np.uint32(B * (step + 1)),
    }


def stacked_batch(data_seeds, step: int) -> dict:
    batches = [make_batch(seed, step) for seed in data_seeds]
    arrays = {name: np.stack([b[name] for b in batches]) for name in batches[0] if name != "cursor"}
    return arrays | {"cursor": batches[0]["cursor"]}


@functools.cache
def together(
    optimizer: OptimizerConfig, num_devices: int, shared: bool = False, steps: int = STEPS
):
    mesh = members_mesh(len(MEMBERS), jax.devices()[:num_devices])
    runs = MemberRuns(
        MEMBERS,
        functools.partial(init_params, MODEL),
        logical_axes(MODEL),
        LOSS,
        optimizer,
        SCHEDULE,
    )
    state, step = runs.init_state(mesh), runs.make_step(mesh)
    losses = []
    for i in range(steps):
        seeds = [0] if shared else [member.data_seed for member in MEMBERS]
        state, metrics = step(state, stacked_batch(seeds, i))
        losses.append(np.asarray(metrics["train/loss"]))
    return state, np.stack(losses)


def alone(optimizer: OptimizerConfig, member: Member, steps: int = STEPS):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    changed = {
        "learning_rate": member.learning_rate,
        "weight_decay": member.weight_decay,
        "adam_learning_rate": optimizer.adam_learning_rate
        * member.learning_rate
        / optimizer.learning_rate,
    }
    config = OptimizerConfig(name=optimizer.name, **changed)
    tx = make_optimizer(config, logical_axes(MODEL))
    step = make_train_step(LOSS, tx, config, SCHEDULE, state_shardings(MODEL, tx, mesh), mesh)
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(MODEL, tx, mesh, member.seed, init_scale=member.init_scale)
        for i in range(steps):
            state, metrics = step(state, make_batch(member.data_seed, i))
            losses.append(float(metrics["train/loss"]))
    return state, losses


@pytest.mark.parametrize(
    "name, index",
    [
        ("muon", 2),
        *(pytest.param("adamw", i, marks=pytest.mark.long) for i in range(2, len(MEMBERS))),
    ],
)
def test_each_member_is_its_single_run(name, index):
    optimizer = OptimizerConfig(name=name, learning_rate=1e-2, adam_learning_rate=1e-2)
    stacked, losses = together(optimizer, 1)
    state, expected = alone(optimizer, MEMBERS[index])
    np.testing.assert_allclose(losses[:, index], expected, rtol=2e-5)
    member = member_of(stacked, index)
    assert int(member.step) == STEPS and int(member.cursor) == STEPS * B
    np.testing.assert_array_equal(member.rng, state.rng)

    def close(a, b):  # Muon's iteration enlarges float32's rounding
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)

    jax.tree.map(close, member.params, state.params)


@pytest.mark.long
def test_later_each_member_still_learns_as_its_single_run():
    # Rounding has grown by then: what is left is the mean loss, far nearer than two seeds'.
    optimizer = OptimizerConfig(learning_rate=1e-2, adam_learning_rate=1e-2)
    _, losses = together(optimizer, 1, steps=300)
    ours = losses[-50:].mean(axis=0)
    for index in (1, 4):
        _, expected = alone(optimizer, MEMBERS[index], steps=300)
        assert ours[index] == pytest.approx(np.mean(expected[-50:]), rel=2e-3)
    assert np.ptp(ours) > 2e-2 * ours.mean()


def test_members_differ_from_each_other():
    _, losses = together(OptimizerConfig(learning_rate=1e-2, adam_learning_rate=1e-2), 1)
    ends = losses[-1]
    assert len(np.unique(ends)) == len(MEMBERS)
    assert np.all(ends < losses[0])


def test_devices_change_nothing():
    optimizer = OptimizerConfig(learning_rate=1e-2, adam_learning_rate=1e-2)
    state, losses = together(optimizer, 8)
    kernel = state.params["embedder"]["embedding"]
    assert len(kernel.sharding.device_set) == 6
    assert kernel.addressable_shards[0].data.shape[0] == 1
    np.testing.assert_allclose(losses, together(optimizer, 1)[1], rtol=2e-5)


def test_one_batch_for_all_is_the_same_batch_for_each():
    optimizer = OptimizerConfig(learning_rate=1e-2, adam_learning_rate=1e-2)
    _, shared = together(optimizer, 1, shared=True)
    _, apart = together(optimizer, 1)
    same = [i for i, member in enumerate(MEMBERS) if member.data_seed == 0]
    np.testing.assert_allclose(shared[:, same], apart[:, same], rtol=2e-5)


@pytest.mark.parametrize("members, devices, used", [(6, 8, 6), (6, 4, 3), (7, 4, 1), (16, 8, 8)])
def test_as_many_devices_as_divide_the_members(members, devices, used):
    assert members_mesh(members, jax.devices()[:devices]).size == used


def test_lowered_for_devices_it_is_the_step_that_runs():
    optimizer = OptimizerConfig(learning_rate=1e-2, adam_learning_rate=1e-2)
    init, axes = functools.partial(init_params, MODEL), logical_axes(MODEL)
    runs = MemberRuns(MEMBERS, init, axes, LOSS, optimizer, SCHEDULE)
    mesh = members_mesh(len(MEMBERS), jax.devices()[:6])
    batch = stacked_batch([member.data_seed for member in MEMBERS], 0)
    compiled = runs.make_step(mesh).lower(runs.abstract_state(mesh), batch).compile()
    state = runs.init_state(mesh)
    shapes = jax.tree.leaves(runs.abstract_state(mesh))
    for ours, expected in zip(jax.tree.leaves(state), shapes, strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
        assert ours.sharding.is_equivalent_to(expected.sharding, ours.ndim)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    rows = sum(x.nbytes for name, x in batch.items() if name != "cursor") // 6
    assert chip_memory(compiled).state == pytest.approx(here + rows, rel=0.02)
