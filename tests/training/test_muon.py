"""Muon on a mesh: what one device computes, with its matrices exchanged and never gathered."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.parallel.collectives import read_collectives
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings
from llm.training.config import OptimizerConfig
from llm.training.optimizers import make_optimizer, muon_dimensions

DENSE = TransformerConfig(
    vocab_size=64,
    width=16,
    num_layers=6,  # more than one device's share, and no multiple of eight
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=32,
    max_length_tokens=8,
)
EXPERTS = dataclasses.replace(
    DENSE,
    cycle_layers=("global_moe",),
    num_experts=4,
    experts_per_token=2,
    expert_mlp_width=24,
)
CONFIG = OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=0.01)


def jitted_update(config, mesh=None, **sizes):
    """Return the jitted update, its arguments, and where parameters lie."""
    model = Transformer(config)
    axes = logical_axes(model)
    optimizer = make_optimizer(CONFIG, axes)
    params = init_params(model, jax.random.key(0))
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    shardings = None if mesh is None else make_shardings(mesh, axes, params)
    if shardings is not None:
        params, grads = jax.device_put((params, grads), (shardings, shardings))
    update = jax.jit(
        lambda grads, state, params: optimizer.update(grads, state, params)[0],
        out_shardings=shardings,
    )
    return update, (grads, jax.jit(optimizer.init)(params), params)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [pytest.param(DENSE, {"fsdp": 8}, marks=pytest.mark.long),
     pytest.param(DENSE, {"fsdp": 2, "tensor": 2, "pipeline": 2}, marks=pytest.mark.long),
     (EXPERTS, {"fsdp": 2, "expert": 2, "tensor": 2}),
     pytest.param(EXPERTS, {"data": 2, "expert": 4}, marks=pytest.mark.long)],
    ids=["fsdp", "pipeline", "experts", "experts alone"],
)  # fmt: skip
def test_a_mesh_updates_as_one_device_does_and_gathers_no_matrix(config, sizes):
    update, arguments = jitted_update(config)
    alone = update(*arguments)
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)), jax.devices()[:8])
    update, arguments = jitted_update(config, mesh)
    with jax.set_mesh(mesh):
        compiled = update.lower(*arguments).compile()
        together = compiled(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-3, atol=1e-5),
        alone,
        together,
    )
    kinds = {each.kind for each in read_collectives(compiled, mesh)}
    assert "all-gather" not in kinds
    assert ("all-to-all" in kinds) == ("fsdp" in sizes)


def test_updates_are_optaxs():
    """Of one device, through the whole of `optax.contrib.muon`, in one piece."""
    model = Transformer(DENSE)
    update, (grads, _, params) = jitted_update(DENSE)
    theirs = optax.contrib.muon(
        1.0,
        beta=CONFIG.beta1,
        eps=CONFIG.epsilon,
        adam_b1=CONFIG.adam_beta1,
        adam_b2=CONFIG.beta2,
        adam_learning_rate=CONFIG.adam_learning_rate / CONFIG.learning_rate,
        muon_weight_dimension_numbers=muon_dimensions(logical_axes(model)),
    )
    wanted, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
    undecayed = dataclasses.replace(CONFIG, weight_decay=0.0)
    ours = make_optimizer(undecayed, logical_axes(model))
    found, _ = jax.jit(ours.update)(grads, ours.init(params), params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, found, wanted)
