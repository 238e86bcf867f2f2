"""MaxText's published runs on TPU v5e and v5p, as workloads.

Shapes are base.yml's (width 2048, 16 heads of 128, feed-forward 7168 gated, 16 layers, vocabulary
32,000) times the powers of two that `global_parameter_scale` gives; batches, remat policies and
meshes those of MaxText/configs/{v5e,v5p}/*.sh; results those of the README.md beside them, in
TFLOP/s a chip with all T² scores counted. github.com/AI-Hypercomputer/maxtext, 2024.
"""

import math
from typing import NamedTuple

from llm.models.config import ComputeConfig, TransformerConfig
from llm.scaling.hardware import Slice, parse_slice
from llm.scaling.plan import Plan, make_plan
from llm.scaling.workload import Workload, cached_flops, mesh_sizes
from llm.training.config import OptimizerConfig

LENGTH = 2048
# billions of parameters: sequences a chip, remat policy ("minimal" keeps the products' results;
# 128B on v5e moves them to the host besides), tensor parallelism
V5E = {
    16: (6, "full", 1),
    32: (4, "full", 1),
    64: (2, "full", 1),
    128: (1, "dots_with_no_batch", 16),
}
V5P = {
    32: (7, "dots_with_no_batch", 4),
    64: (3, "dots_with_no_batch", 4),
    128: (1, "dots_with_no_batch", 8),
    256: (1, "dots_with_no_batch", 8),
    512: (2, "full", 8),
    1024: (2, "full", 8),
}
SHAPES = {64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}


class Run(NamedTuple):
    """A published run: "v5e" or "v5p", chips a slice (v5p-128 has 64), slices, TFLOP/s a chip."""

    chip: str
    billions: int
    slice_chips: int
    slices: int
    tflops: float


RUNS = [
    Run("v5e", billions, 256, slices, tflops)
    for slices, row in {
        1: (120, 132, 118, 110),
        2: (117, 128, 112, 110),
        4: (117, 126, 110, 108),
        8: (115, 125, 108, 104),
        16: (111, 123, 105, 100),
        32: (108, 119, 99, 91),
    }.items()
    for billions, tflops in zip(V5E, row, strict=True)
] + [
    Run("v5p", billions, chips, slices, tflops)
    for billions, chips, row in (
        (32, 64, (328, 319)),
        (64, 64, (323, 309)),
        (128, 128, (315, 305)),
        (128, 256, (316, 274)),
        (256, 512, (308, 289)),
        (512, 512, (294, 282)),
        (1024, 1024, (254, 237)),
        (1024, 2048, (297, 279)),
    )
    for slices, tflops in enumerate(row, start=1)
]


def model(billions: int) -> TransformerConfig:
    """Return the shape of that global_parameter_scale: heads and feed-forward double first, then
    the width, then the layers."""
    doublings = int(math.log2(billions))
    third, rest = divmod(doublings, 3)
    return TransformerConfig(
        vocab_size=32_000,
        width=2048 * 2 ** (third + (rest > 1)),
        num_layers=16 * 2**third,
        num_heads=16 * 2 ** (third + (rest > 0)),
        num_kv_heads=16 * 2 ** (third + (rest > 0)),
        head_dim=128,
        mlp_width=7168 * 2 ** (third + (rest > 0)),
        max_length_tokens=LENGTH,
    )


def where(run: Run) -> Slice:
    shape = "16x16" if run.chip == "v5e" else SHAPES[run.slice_chips]
    return parse_slice(f"{run.slices}*{run.chip}:{shape}")


def workload(run: Run) -> Workload:
    sequences, remat, _ = (V5E if run.chip == "v5e" else V5P)[run.billions]
    batch = sequences * run.slice_chips * run.slices
    return Workload(
        model(run.billions),
        ComputeConfig(dtype="bfloat16", remat=remat, unroll_layers=False),
        OptimizerConfig(),
        batch_sequences=batch,
        length_tokens=LENGTH,
        loss_tile_tokens=batch * LENGTH,
    )


def plan(run: Run) -> Plan:
    tensor = (V5E if run.chip == "v5e" else V5P)[run.billions][2]
    sizes = mesh_sizes((run.slices, run.slice_chips // tensor, 1, 1, 1, tensor))
    return make_plan(workload(run), sizes, where(run))


def tflops(run: Run, seconds: float) -> float:
    """Return TFLOP/s a chip by their convention, of a step of that many seconds."""
    flops = cached_flops(model(run.billions), LENGTH, causal_half=False).training()
    return flops * workload(run).tokens / seconds / where(run).num_chips / 1e12
