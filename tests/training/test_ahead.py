"""A step compiled ahead of time is the step that runs, and its memory is what the arrays take."""

import sys

import jax
import numpy as np
import pytest

from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, logical_axes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.training.ahead import abstract_batch, abstract_state, chip_memory, topology_devices
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import init_state, state_shardings
from llm.training.step import make_train_step, place_batch

MODEL = Transformer(
    TransformerConfig(
        vocab_size=256,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        mlp_width=64,
        max_length_tokens=16,
    )
)
B, T = 8, 16


@pytest.fixture(scope="module")
def trainer():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    optimizer = make_optimizer(OptimizerConfig(), logical_axes(MODEL))
    schedule = make_schedule(ScheduleConfig("constant"), total_steps=5, tokens_per_step=B * T)
    shardings = state_shardings(MODEL, optimizer, mesh)
    loss_fn = make_causal_lm_loss(MODEL, tile_tokens=64)
    step = make_train_step(loss_fn, optimizer, OptimizerConfig(), schedule, shardings, mesh)
    return mesh, optimizer, step


def make_batch():
    tokens = np.random.default_rng(0).integers(0, 256, (B, T)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}
    batch |= {"segment_ids": np.ones_like(tokens), "positions": np.tile(np.arange(T), (B, 1))}
    batch |= {"loss_weights": np.ones((B, T), np.float32), "cursor": np.uint32(B)}
    return batch | {"positions": batch["positions"].astype(np.int32)}


def test_what_is_compiled_is_what_runs(trainer):
    mesh, optimizer, step = trainer
    compiled = step.lower(
        abstract_state(MODEL, optimizer, mesh), abstract_batch(mesh, B, T)
    ).compile()
    with jax.set_mesh(mesh):
        expected = step(init_state(MODEL, optimizer, mesh, 0), make_batch())
        # It takes arrays of exactly these shapes and places, or raises.
        found = compiled(init_state(MODEL, optimizer, mesh, 0), place_batch(make_batch(), mesh))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_memory_of_the_state_is_that_of_its_arrays(trainer):
    mesh, optimizer, step = trainer
    compiled = step.lower(
        abstract_state(MODEL, optimizer, mesh), abstract_batch(mesh, B, T)
    ).compile()
    state = init_state(MODEL, optimizer, mesh, 0)
    arrays = jax.tree.leaves((state, place_batch(make_batch(), mesh)))
    here = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    memory = chip_memory(compiled)
    assert memory.state == pytest.approx(here, rel=0.02)  # and the metrics, a few bytes
    assert memory.total > memory.state


def test_a_topology_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match="v9z:4x4.*libtpu must be installed"):
        topology_devices("v9z:4x4")
