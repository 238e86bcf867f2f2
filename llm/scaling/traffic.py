"""What a step computes and sends on each device, by closed forms. Third floor.

Collectives count as `llm/parallel/collectives.py` counts those of a compiled step: bytes that a
device sends, by a ring's count. The forms are those of the least that the mesh's rules ask for; a
compiler may do more.
"""

import dataclasses
from collections import Counter

from llm.models.config import TransformerConfig
from llm.scaling.workload import (
    Sizes,
    StateArray,
    Workload,
    batch_parts,
    cached_flops,
    cached_training_flops,
    param_arrays,
    state_arrays,
)

_SPLASH_BLOCK = 512  # llm/models/splash.py
_FLASH_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step of all devices together, by what computes them."""

    model: float  # forward and backward by the convention of MFU
    products: float  # matrix products, those that rematerialisation repeats included
    attention: float  # kernels, with what they compute of masked scores
    optimizer: float  # products of the optimizer's (Muon's orthogonalisation)

    @property
    def executed(self) -> float:
        return self.products + self.attention + self.optimizer


def count_work(workload: Workload, platform: str = "tpu") -> Work:
    """Return the FLOPs of a step on "tpu" or "gpu"."""
    config, length = workload.model, workload.length_tokens
    flops = cached_flops(config, length)
    per_token = flops.projections * (3 + _repeated_projections(workload)) + flops.head * 3
    return Work(
        model=cached_training_flops(config, length) * workload.tokens,
        products=per_token * workload.tokens,
        attention=_attention_flops(workload, platform),
        optimizer=_muon_flops(workload) if workload.optimizer.name == "muon" else 0.0,
    )


def _attention_flops(workload: Workload, platform: str) -> float:
    """Return what the platform's kernel computes, in forward passes over all scores.

    A forward pass is two products. Splash's backward is seven: three for the queries, four for keys
    and values, of which two each are the scores and their gradient again; FlashAttention's, as
    cuDNN's, is five (Dao 2023, arXiv:2307.08691, section 3.1). Rematerialisation runs the forward
    once more. Blocks that the mask hides are left out.
    """
    config, length = workload.model, workload.length_tokens
    backward, block = (3.5, _SPLASH_BLOCK) if platform == "tpu" else (2.5, _FLASH_BLOCK)
    runs = 1.0 + backward + (workload.compute.remat != "none")
    whole = cached_flops(config, length, causal_half=False).attention
    return runs * whole * _visited_share(config, length, block) * workload.tokens


def _repeated_projections(workload: Workload) -> float:
    """Return which share of the layers' forward products the backward pass repeats.

    The last product of a layer is not: nothing in the backward pass asks for its result.
    """
    if workload.compute.remat not in ("full", "attention"):
        return 0.0
    layers = [
        a for a in param_arrays(workload) if a.name.endswith("kernel") and "vocab" not in a.names
    ]
    last = "down" if workload.model.activation != "none" else "out"
    total = sum(_active_size(workload.model, a) for a in layers)
    return (
        1.0 - sum(_active_size(workload.model, a) for a in layers if f"/{last}/" in a.name) / total
    )


def _active_size(config: TransformerConfig, array: StateArray) -> float:
    """Return a parameter's size, of experts' that of the chosen ones."""
    experts = getattr(config, "num_experts", 0)
    if "experts" not in array.names or not experts:
        return array.size
    return array.size * config.experts_per_token / experts


def _visited_share(config: TransformerConfig, length: int, largest_block: int) -> float:
    """Return which share of all scores lies in blocks that the kernel visits."""
    if config.attention != "causal":
        return 1.0
    # none divides it: dense attention, which computes all scores
    block = next((b for b in (largest_block, 256, 128) if length % b == 0), length)
    blocks = length // block
    shares = []
    for kind in config.layer_kinds:
        window = config.sliding_window_tokens if kind.startswith("local") else None
        seen = blocks if window is None else min(blocks, -(-(window - 1) // block) + 1)
        visited = sum(min(i + 1, seen) for i in range(blocks))
        shares.append(visited / blocks**2)
    return sum(shares) / len(shares)


def is_muons(array: StateArray) -> bool:
    """Whether Muon updates a parameter: a matrix inside a layer (llm/training/optimizers.py)."""
    matrix = array.name.endswith("kernel") and "embed" in array.names
    return matrix and "vocab" not in array.names


def _muon_flops(workload: Workload) -> float:
    """Five Newton–Schulz steps of a matrix of m rows and n ≥ m columns: 4·m²·n + 2·m³ each.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; optax.contrib.muon's default.
    """
    total = 0.0
    for array in filter(is_muons, param_arrays(workload)):
        dims = dict(zip(array.names, array.shape, strict=True))
        stack = dims.get("layers", 1) * dims.get("experts", 1)
        m, n = sorted((dims["embed"], array.size // stack // dims["embed"]))
        total += stack * 5 * (4 * m * m * n + 2 * m**3)
    return total


# ------------------------------------------------------------------------------ network


def count_traffic(workload: Workload, sizes: Sizes) -> dict[str, float]:
    """Return the bytes that a device sends in a step along each mesh axis."""
    sent = Counter(_params_traffic(workload, sizes))
    sent.update(_activations_traffic(workload, sizes))
    if workload.optimizer.name == "muon" and sizes["fsdp"] > 1:
        # each of its five steps gathers the iterate twice, in bfloat16
        size = sum(
            a.size / a.parts(sizes, without=("fsdp",))
            for a in param_arrays(workload)
            if is_muons(a)
        )
        sent["fsdp"] += 5 * 2 * 2 * size * (sizes["fsdp"] - 1) / sizes["fsdp"]
    return {axis: sent[axis] for axis in sizes if sent[axis]}


def loss_tiles(workload: Workload, sizes: Sizes) -> int:
    """Return in how many tiles the loss of a microbatch is taken."""
    rows = workload.batch_sequences // workload.accumulate_steps
    wanted = max(1, -(-rows * workload.length_tokens // max(1, workload.loss_tile_tokens)))
    length = workload.length_tokens
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)


def _params_traffic(workload: Workload, sizes: Sizes) -> dict[str, float]:
    """Gathers of parameters before their use, sums of their gradients after it."""
    sent = Counter()
    micro, tiles = workload.accumulate_steps, loss_tiles(workload, sizes)
    f = sizes["fsdp"]
    for array in param_arrays(workload):
        whole = workload.itemsize * array.size / array.parts(sizes, without=("fsdp",))
        if f > 1 and any("fsdp" in axes for axes in array.axes):
            # Gathered for the forward and for the backward pass, its gradient scattered. The head:
            # gathered once a tile for both, and its gradient summed over all devices, of which
            # each keeps its part; so the embedding's, once, and in float32.
            if array.name.startswith("head"):
                times = (1 + 2) * tiles
            elif "embedding" in array.name:
                times = 1 + 2 * 2
            else:
                times = 3
            sent["fsdp"] += micro * times * whole * (f - 1) / f
        # Devices that hold the same part of a parameter but other tokens: their gradients' sum, of
        # tables and head in float32.
        width = 4 if "vocab" in array.names else workload.itemsize
        for axis in ("data", "expert", "context"):
            n = sizes[axis]
            if n > 1 and not any(axis in axes for axes in array.axes):
                held = width * array.size / array.parts(sizes)
                sent[axis] += micro * 2 * held * (n - 1) / n
    return dict(sent)


def _activations_traffic(workload: Workload, sizes: Sizes) -> dict[str, float]:
    """Sums of partial products, and tokens that change places (context, expert, pipeline)."""
    config, sent = workload.model, Counter()
    stages = sizes["pipeline"]
    # of all microbatches, in each layer that a device holds
    tokens = workload.tokens / batch_parts(sizes) / sizes["context"]
    layers = config.num_layers / stages
    again = workload.compute.remat in ("full", "attention")
    stream = tokens * config.width * workload.itemsize
    g = sizes["tensor"]
    if g > 1:
        blocks = 1 if config.activation == "none" else 2
        # Forward and backward, a sum each after attention and after the feed-forward block;
        # recomputed but the last. Outside of layers: embedding (float32) and the head's input.
        sums = layers * (2 * blocks + again * (blocks - 1)) + (2 + 1) / stages
        sent["tensor"] = 2 * (g - 1) / g * stream * sums
    c = sizes["context"]
    if c > 1:
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim / g
        sent["context"] = (c - 1) / c * layers * (2 + again) * tokens * heads * workload.itemsize
    e, mixed = sizes["expert"], sum(kind.endswith("_moe") for kind in config.layer_kinds)
    if e > 1 and mixed:
        there_and_back = 2 * config.experts_per_token * stream
        sent["expert"] = (e - 1) / e * mixed / stages * (2 + again) * there_and_back
    if stages > 1:
        repeats = getattr(workload.compute, "pipeline_repeats", 1)
        sent["pipeline"] = 2 * repeats * stream  # each microbatch goes on once a stretch of layers
    return dict(sent)


def pipeline_bubble(workload: Workload, sizes: Sizes) -> float:
    """Return the share of the time that a stage waits: (S − 1) / (M·R + S − 1).

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2, for a circular schedule.
    """
    stages = sizes["pipeline"]
    repeats = getattr(workload.compute, "pipeline_repeats", 1)
    parts = getattr(workload.compute, "pipeline_microbatches", None) or 2 * stages
    return (stages - 1) / (parts * repeats + stages - 1)


# ------------------------------------------------------------------------------- memory


def count_layer_memory_traffic(workload: Workload, sizes: Sizes) -> float:
    """Return the bytes that a device reads and writes for the products of all microbatches.

    Each product's inputs once, its output once; element-wise work taken to ride along.
    """
    config = workload.model
    passes = 3 + _repeated_projections(workload)
    tokens = workload.tokens / batch_parts(sizes) / sizes["context"]
    d, g = config.width, sizes["tensor"]
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / g
    out = config.num_heads * config.head_dim / g
    wide = workload.active_mlp_width * (2 if config.gated else 1) / g
    a_token = (d + heads) + (heads + out) + (out + d) + (d + wide) + (wide + d)
    activations = (
        passes * tokens * a_token * workload.itemsize * config.num_layers / sizes["pipeline"]
    )
    weights = sum(
        workload.itemsize * array.size / array.parts(sizes, without=("fsdp",))
        for array in param_arrays(workload)
        if "layers" in array.names
    )
    return activations + workload.accumulate_steps * (passes + 1) * weights


def count_update_memory_traffic(workload: Workload, sizes: Sizes) -> float:
    """Return the bytes that the update reads and writes: the state, and the gradients twice."""
    state = sum(a.size * a.itemsize / a.parts(sizes) for a in state_arrays(workload))
    gradients = sum(4 * a.size / a.parts(sizes) for a in param_arrays(workload))
    return 2 * state + 2 * gradients
