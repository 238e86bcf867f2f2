"""What a training step sends over each mesh axis, as compiled for a TPU, is what arithmetic says.

CPUs' collectives are others. Skipped without libtpu, which compiles for TPUs that are not here.
"""

import dataclasses
import importlib.util
import math
from collections import Counter

import jax
import pytest

from configs.schema import PretrainConfig
from experiments.plan_step import compile_step, lower_pretraining, workload_of
from llm.data.config import DataConfig
from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, param_shapes
from llm.parallel.collectives import bytes_by_axes
from llm.parallel.config import MeshConfig
from llm.scaling.traffic import count_traffic
from llm.scaling.workload import mesh_sizes
from llm.training.ahead import topology_devices

B, T = 32, 512
MODEL = TransformerConfig(
    vocab_size=2048,
    width=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=2048,
    max_length_tokens=T,
)
N, K, H, D, L = 8, 4, 64, 512, 4
BF16, F32 = 2, 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


EXPERTS = dataclasses.replace(
    MODEL,
    cycle_layers=("global_moe",),
    num_experts=8,
    experts_per_token=2,
    expert_mlp_width=1024,
    expert_capacity_factor=1.25,
)


def recipe(model=MODEL, **mesh):
    return PretrainConfig(
        model=model,
        compute=ComputeConfig(dtype="bfloat16", remat="full", unroll_layers=False),
        mesh=MeshConfig(**({"data": 1} | mesh)),
        data=DataConfig(batch_sequences=B, length_tokens=T),
        total_steps=10,
    )


def collectives(config, topology="v5e:2x4", num_slices=1):
    devices = topology_devices(topology, num_slices)
    compiled = compile_step(*lower_pretraining(config, devices))
    assert sum(compiled.kernels.values())  # splash attention
    return compiled.collectives


def of_kind(found, kind, axes):
    return [c for c in found if c.kind == kind and c.axes == axes]


def layer_params():
    layers = param_shapes(Transformer(MODEL))["cycle"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(layers)) // L


def test_context_sends_heads_for_stretches_and_gathers_no_activation():
    found = collectives(recipe(data=2, context=4))
    # queries and outputs, keys and values: forward, again in the backward pass, and their gradients
    each = (B // 2) * (T // 4) * H * BF16 * 3 // 4
    sent = sum(c.total_bytes for c in of_kind(found, "all-to-all", ("context",)))
    assert sent == L * 3 * 2 * (N + K) * each
    segments = B * T * 4
    assert all(c.bytes_a_device <= segments for c in found if c.kind == "all-gather")


def test_a_pipeline_shifts_hidden_states_and_sums_gradients_once():
    found = collectives(recipe(data=2, pipeline=4))
    microbatches, turns = 8, 8 + 3
    hidden = B // 2 // microbatches * T * D * BF16
    shifts = of_kind(found, "collective-permute", ("pipeline",))
    assert Counter(c.count for c in shifts if c.bytes_a_device == hidden) == {turns: 2}
    # of its own layer each device's group sums the gradients in float32, once
    sums = of_kind(found, "all-reduce", ("data",))
    assert {c.count for c in sums} == {1}
    assert sum(c.total_bytes for c in sums) == pytest.approx(layer_params() * F32, rel=1e-3)
    # Hidden states go in to the first stage and come out of it, and their gradients the other way;
    # cos and sin of the angles go in.
    ends = (4 * D * BF16 + 2 * H // 2 * F32) * (B // 2) * T * 3 // 4
    rest = bytes_by_axes(found)["pipeline",] - 2 * turns * hidden
    assert rest == pytest.approx(ends, rel=0.01)  # and segments


@pytest.mark.long
def test_what_fsdp_gathers_for_a_pipeline_it_gathers_once():
    found = collectives(recipe(fsdp=4, pipeline=2))
    gathers = of_kind(found, "all-gather", ("fsdp",))
    assert {c.count for c in gathers} == {1}
    own = L // 2 * layer_params() + 2 * MODEL.vocab_size * D
    assert sum(c.total_bytes for c in gathers) == pytest.approx(own * BF16 * 3 / 4, rel=0.02)
    # the layers' gradients once, and the head's of a device's one tile
    scattered = sum(c.total_bytes for c in of_kind(found, "reduce-scatter", ("fsdp",)))
    head = MODEL.vocab_size * D * BF16
    assert scattered == pytest.approx((L // 2 * layer_params() * F32 + head) * 3 / 4, rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "slices"),
    [
        (recipe(data=8), 1),
        (recipe(data=2, fsdp=4), 1),
        (recipe(data=2, tensor=4), 1),
        (recipe(data=2, fsdp=2, tensor=2), 1),
        (recipe(EXPERTS, fsdp=2, expert=4), 1),
        (recipe(data=2, fsdp=4), 2),
    ],
    ids=["data", "fsdp", "tensor", "three", "experts", "slices"],
)
def test_no_more_is_sent_than_the_rules_ask_for(config, slices):
    """Gathers are of parameters along fsdp, none of more than the largest, and along no other axis
    of anything; and by the axes together the bytes are those that plans count with, to 5%, where
    the compiler may sum along fsdp what it could scatter."""
    found = collectives(config, "v5e:2x2" if slices > 1 else "v5e:2x4", slices)
    gathers = [c for c in found if c.kind == "all-gather" and c.shape.startswith(("bf16", "f32"))]
    shapes = jax.tree.leaves(param_shapes(Transformer(config.model)))
    largest = max(math.prod(x.shape) for x in shapes) * F32
    assert {c.axes for c in gathers} <= {("fsdp",)}
    assert all(c.bytes_a_device < largest for c in gathers)
    sizes = mesh_sizes(config.mesh, 8)
    predicted = count_traffic(workload_of(config), sizes)
    sent = sum(c.total_bytes for c in found)
    least, along_fsdp = sum(predicted.values()), predicted.get("fsdp", 0.0)
    assert 0.95 * least <= sent <= 1.05 * least + along_fsdp
    if slices > 1:
        crossing = sum(c.total_bytes for c in found if c.axes == ("data",))
        assert crossing == pytest.approx(predicted["data"], rel=0.05)
