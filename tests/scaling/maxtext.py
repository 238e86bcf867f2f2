"""MaxText's published runs on TPU v5e and v5p, as workloads.

Of github.com/AI-Hypercomputer/maxtext, under MaxText/, file and commit:

- results: configs/{v5e,v5p}/README.md, 0ed7bd529b9d690570473c3525d1efeda6b6c944, the same as in
  76bd53b0f44caf989c88189afadeb1062f9254f0. TFLOP/s a chip as maxtext_utils.py counts
  (`calculate_tflops_training_per_device`, 0245b56820bb37b2f1770e01483d406a3f0066f3): with the head
  and all T² scores;
- shapes: configs/base.yml, 000e93554a028c208eeacc75b7c1813a79ae6219 (width 2048, 16 heads of 128,
  feed-forward 7168 gated, 16 layers, vocabulary 32,000), times the powers of two that pyconfig.py
  gives (`get_individual_scales`, 0045bf834da3f240bfed3b86141fe085303fba4e);
- batches, remat policies and meshes: configs/{v5e,v5p}/*.sh, their commits below;
- slices: accelerator_to_spec_map.py, 035dd3dcd42db9deeb1e015fea5df0b13c492d8a.
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
    16: (6, "full", 1),  # 07775101f8aa8329d71765c5633d980bf6b3afac
    32: (4, "full", 1),  # 07775101f8aa8329d71765c5633d980bf6b3afac
    64: (2, "full", 1),  # 43fce2e7e9c7e65747d60c2fce084d2a5d19d6e3
    128: (1, "dots_with_no_batch", 16),  # 3d048f7b461ec9806a03e8bb89bb7129d2c1c327
}
V5P = {
    # 6 sequences in later scripts (8c3d2e65aa05446ce6674ea40ce7814be14a02ad), with the same results
    32: (7, "dots_with_no_batch", 4),  # 0d9779a57e8407f5d4fbb64ffc2074797d714838
    64: (3, "dots_with_no_batch", 4),  # 3d048f7b461ec9806a03e8bb89bb7129d2c1c327
    128: (1, "dots_with_no_batch", 8),  # 07775101f8aa8329d71765c5633d980bf6b3afac
    256: (1, "dots_with_no_batch", 8),  # 07775101f8aa8329d71765c5633d980bf6b3afac
    512: (2, "full", 8),  # 07775101f8aa8329d71765c5633d980bf6b3afac
    1024: (2, "full", 16),  # 8c3d2e65aa05446ce6674ea40ce7814be14a02ad
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
