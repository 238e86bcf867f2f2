"""Experts on meshes against one device, loss, sums and gradients, in float64; pipelined, too."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.moe import MixtureOfExperts
from llm.models.router import gather_sums
from llm.models.transformer import Transformer, init_cache, init_params, logical_axes, param_shapes
from llm.models.unstack import unstack, unstacked
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings
from llm.training.ahead import topology_devices

CONFIG = TransformerConfig(
    vocab_size=64,
    width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=8,
    cycle_layers=("global_moe",),
    num_experts=8,
    experts_per_token=2,
    expert_mlp_width=4,
    shared_expert_width=4,
    max_length_tokens=16,
    vocab_multiple=8,
)
COMPUTE = ComputeConfig(dtype="float64", unroll_layers=False, remat="full")
# Of the dropless form, of one with room for all, of one without.
FORMS = {"dropless": None, "roomy": 4.0, "tight": 0.5}
B, T = 8, 6
MIXED = dict(expert=2, fsdp=2, tensor=2)
MESHES = [
    dict(expert=8),
    dict(expert=2, fsdp=2, tensor=2),
    dict(expert=4, context=2),
    dict(data=2, fsdp=2, tensor=2),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def mesh_of(sizes):
    return make_mesh(MeshConfig(**{"data": 1} | sizes))


@functools.cache
def inputs():
    """Return (parameters, tokens, segments with padding): float64 in all of the parameters."""
    with jax.enable_x64(True):
        params = init_params(Transformer(CONFIG, COMPUTE), jax.random.key(0))
        params = jax.tree.map(lambda x: 5 * np.asarray(x, np.float64), params)
    tokens = np.random.default_rng(0).integers(0, 64, (B, T)).astype(np.int32)
    segments = np.broadcast_to(np.arange(T) < T - 1, (B, T)).astype(np.int32)
    return params, jnp.asarray(tokens), jnp.asarray(segments)


def value_and_grads(form, mesh=None):
    model = Transformer(dataclasses.replace(CONFIG, expert_capacity_factor=FORMS[form]), COMPUTE)
    params, tokens, segments = inputs()

    def loss(params):
        (hidden, _), variables = model.apply(
            {"params": params}, tokens, segment_ids=segments, method="hidden", mutable=["router"]
        )
        sums = gather_sums(variables)
        value = jnp.sum(jnp.sin(hidden) * segments[..., None])
        return value + jnp.sum(sums.scores**2) + jnp.sum(sums.squared_log_z), sums

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        return step(params)
    with jax.set_mesh(mesh):
        shardings = make_shardings(mesh, logical_axes(model), param_shapes(model))
        return step(jax.device_put(params, shardings))


@functools.cache
def one_device(form):
    return jax.tree.map(np.asarray, value_and_grads(form))


def assert_equal(found, expected):
    def one(path, a, b):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=str(path))

    jax.tree_util.tree_map_with_path(one, found, expected)


@pytest.mark.parametrize(
    "sizes, form",
    [
        pytest.param(
            sizes, form, id=f"{sizes}-{form}", marks=[] if sizes == MIXED else [pytest.mark.long]
        )
        for sizes in MESHES
        for form in FORMS
    ],
)
def test_every_mesh_gives_what_one_device_does(sizes, form):
    expected = one_device(form)
    assert (expected[0][1].dropped.sum() > 0) == (form == "tight")
    assert_equal(value_and_grads(form, mesh_of(sizes)), expected)


@pytest.mark.parametrize("batch", [1, 8])
def test_decoding_on_a_mesh_is_the_full_forward(batch):
    """Batches smaller than the mesh are padded on their way to the experts."""
    model = Transformer(CONFIG, dataclasses.replace(COMPUTE, remat="none"))
    params, tokens, _ = inputs()
    tokens = tokens[:batch]
    expected = model.apply({"params": params}, tokens)
    flat = unstacked(model)
    with jax.set_mesh(mesh_of(dict(expert=4, fsdp=2))):

        @jax.jit
        def decode(params):
            params = unstack(model, params)
            cache = init_cache(flat.config, batch, T, jnp.float64)
            logits, cache = flat.apply({"params": params}, tokens[:, :-1], cache=cache)
            last, _ = flat.apply({"params": params}, tokens[:, -1:], cache=cache)
            return jnp.concatenate([logits, last], axis=1)

        np.testing.assert_allclose(decode(params), expected, atol=1e-5)  # logits are float32's


@pytest.mark.long
def test_tpus_send_only_what_there_is_to_send():
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4), topology_devices("v5e:2x4"))
    compute = ComputeConfig(dtype="bfloat16", unroll_layers=False)
    module = MixtureOfExperts(CONFIG, compute, AdapterConfig())
    params = jax.eval_shape(
        lambda: nn.unbox(module.init(jax.random.key(0), jnp.ones((1, 1, 8)), real=None))["params"]
    )
    x = jax.ShapeDtypeStruct((B, 128, CONFIG.width), jnp.bfloat16)

    def loss(params, x):
        return jnp.sum(module.apply({"params": params}, x, real=None).astype(jnp.float32))

    with jax.enable_x64(False), jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, x).compile().as_text()
    assert "ragged-all-to-all" in text
