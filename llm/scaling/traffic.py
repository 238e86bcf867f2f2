"""What a step sends, reads and writes on each device, by closed forms. Third floor.

Collectives count as `llm/parallel/collectives.py` counts those of a compiled step: bytes that a
device sends, by a ring's count. The forms are those of what our step asks for. The compiler does
more at times: where a device's part is narrow it sums whole what it could gather or scatter, which
sends twice as much.
"""

from collections import Counter

from llm.models.context import num_repeats
from llm.scaling.work import muon_shares, repeated_share, rows_per_token
from llm.scaling.workload import (
    Sizes,
    StateArray,
    Workload,
    batch_parts,
    param_arrays,
    state_arrays,
)

# Axes over which gradients are summed, nearest first: what is summed over one is then cut by it.
_SUMMED_OVER = ("context", "pipeline", "expert", "fsdp", "data")


def count_traffic(workload: Workload, sizes: Sizes, platform: str = "tpu") -> dict[str, float]:
    """Return the bytes that a device sends in a step along each mesh axis."""
    sent = Counter()
    for array in param_arrays(workload):
        sent.update(_param_traffic(workload, sizes, array))
    sent.update(_stream_traffic(workload, sizes))
    if workload.model.moe_layers:
        sent["expert"] += _expert_traffic(workload, sizes, platform)
    if workload.optimizer.name == "muon":
        sent.update(_muon_traffic(workload, sizes))
    return {axis: sent[axis] for axis in sizes if sent[axis]}


def _param_traffic(workload: Workload, sizes: Sizes, array: StateArray) -> dict[str, float]:
    """Gathers of a parameter over fsdp before its use, sums of its gradient after it."""
    sent, micro, itemsize = Counter(), workload.accumulate_steps, workload.itemsize
    f = sizes["fsdp"] if array.is_cut_by("fsdp") else 1
    whole = array.size / array.parts(sizes, without=("fsdp",))
    over_fsdp = whole * (f - 1) / f  # of each number of the array that is gathered or scattered
    # Sums of a table's and head's gradients alone the compiler moves behind the last microbatch.
    moved = not workload.model.tied_head and sizes["tensor"] == 1
    if array.is_table:
        # Looked up in float32 where tensor parallelism cuts it; its gradient is summed whole.
        width = 4 if sizes["tensor"] > 1 else itemsize
        sent["fsdp"] += micro * width * over_fsdp
        times = 1 if moved and sizes["fsdp"] == 1 else micro
        sent.update(_summed(array, sizes, times * 4 * whole, _SUMMED_OVER))
    if array.name.startswith("head") or (workload.model.tied_head and "vocab" in array.names):
        # Gathered once for all tiles and microbatches; its gradient is scattered tile by tile. Sums
        # of several tiles or microbatches are in float32.
        tiles = workload.loss_tiles(sizes)
        sent["fsdp"] += itemsize * over_fsdp * (1 + micro * tiles)
        width = itemsize if tiles == 1 and (micro == 1 or not moved) else 4
        sent.update(_summed(array, sizes, (1 if moved else micro) * width * whole / f))
    elif not array.is_table:
        # Gathered for the forward and for the backward pass, its gradient scattered; by a pipeline
        # gathered once, for all turns of both, and its gradient scattered in float32.
        pipelined = sizes["pipeline"] > 1 and "layers" in array.names
        times, width = (1, 4) if pipelined else (2, itemsize)
        sent["fsdp"] += micro * (times * itemsize + width) * over_fsdp
        sent.update(_summed(array, sizes, micro * width * whole / f))
    return sent


def _summed(
    array: StateArray, sizes: Sizes, num_bytes: float, cut_too: tuple = ()
) -> dict[str, float]:
    """A gradient's sum over the axes whose devices hold the same part of a parameter, but other
    tokens; and over those of `cut_too`, of which each then keeps its part."""
    sent = Counter()
    for axis in _SUMMED_OVER:
        if sizes[axis] > 1 and (axis in cut_too or not array.is_cut_by(axis)):
            sent[axis] += 2 * num_bytes * (sizes[axis] - 1) / sizes[axis]
            num_bytes /= sizes[axis]
    return sent


def _stream_traffic(workload: Workload, sizes: Sizes) -> dict[str, float]:
    """Sums of partial products (tensor), heads for stretches of a row (context), hidden states that
    go from stage to stage (pipeline)."""
    config, compute, itemsize, sent = workload.model, workload.compute, workload.itemsize, Counter()
    g, c, stages = sizes["tensor"], sizes["context"], sizes["pipeline"]
    tokens = workload.tokens / batch_parts(sizes) / c
    stream = tokens * config.width * itemsize
    layers = config.num_layers / stages * workload.turns(sizes)  # that a device runs, idle ones too
    again = compute.remat in ("full", "attention")
    if g > 1:
        blocks = 1 if config.activation == "none" else 2
        # Forward and backward, a sum each after attention and after the feed-forward block;
        # recomputed but the last. Outside of layers: embedding (float32) and the head's input.
        sums = layers * (2 * blocks + again * (blocks - 1)) + (4 / itemsize + 1) / stages
        sent["tensor"] += 2 * (g - 1) / g * stream * sums
    if c > 1:
        kv_heads = config.num_kv_heads * num_repeats(config.num_kv_heads, g * c)
        heads = 2 * (config.num_heads + kv_heads) * config.head_dim / g
        sent["context"] += (c - 1) / c * layers * (2 + again) * tokens * heads * itemsize
    if stages > 1:
        # A shift each turn, there and back. All go in at the first stage and come out of it, and so
        # do their gradients; beside them go the angles of positions, two float32 numbers a pair.
        turns = workload.turns(sizes) * compute.pipeline_repeats
        rotary = 4 * tokens * config.head_dim if config.positions == "rotary" else 0
        at_ends = (4 * stream + rotary) * (stages - 1) / stages
        sent["pipeline"] += 2 * turns * stream + at_ends
    return sent


def _expert_traffic(workload: Workload, sizes: Sizes, platform: str) -> float:
    """Tokens that go to the devices of their experts and back."""
    config, e = workload.model, sizes["expert"]
    tokens = workload.tokens / batch_parts(sizes) / sizes["context"]
    rows = rows_per_token(workload)
    if config.expert_capacity_factor is None and platform != "tpu":
        rows = worst_rows_per_token(workload, sizes)  # buffers are sent whole
    layers = config.moe_layers / sizes["pipeline"] * workload.turns(sizes)
    passes = 2 + (workload.compute.remat in ("full", "attention"))
    one_way = rows * tokens * config.width * workload.itemsize * (e - 1) / e
    return layers * passes * 2 * one_way


def worst_rows_per_token(workload: Workload, sizes: Sizes) -> float:
    """Return how many rows there is room for, for each token of a device, where none is dropped:
    each device may get those of all (llm/models/exchange.py)."""
    config, e = workload.model, sizes["expert"]
    if e == 1:
        return config.experts_per_token
    return e * min(config.experts_per_token, config.num_experts // e)


def _muon_traffic(workload: Workload, sizes: Sizes) -> dict[str, float]:
    """Parts of matrices exchanged, there and back in float32."""
    sent = Counter()
    for share in muon_shares(workload, sizes):
        for axis in share.cuts:
            n = sizes[axis]
            sent[axis] += 2 * 4 * share.matrices * share.size * (n - 1) / n
    return sent


# ------------------------------------------------------------------------------- memory


def count_layer_memory_traffic(workload: Workload, sizes: Sizes) -> float:
    """Return the bytes that a device reads and writes for the products of all microbatches.

    Each product's inputs once, its output once; element-wise work taken to ride along.
    """
    config = workload.model
    passes = 3 + repeated_share(workload)
    tokens = workload.tokens / batch_parts(sizes) / sizes["context"]
    d, g = config.width, sizes["tensor"]
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / g
    out = config.num_heads * config.head_dim / g
    wide = workload.active_mlp_width * (2 if config.gated else 1) / g
    a_token = (d + heads) + (heads + out) + (out + d) + (d + wide) + (wide + d)
    layers = config.num_layers / sizes["pipeline"] * workload.turns(sizes)
    activations = passes * tokens * a_token * workload.itemsize * layers
    weights = sum(
        workload.itemsize * array.size / array.parts(sizes, without=("fsdp",))
        for array in param_arrays(workload)
        if "layers" in array.names
    )
    reads = workload.accumulate_steps
    if sizes["pipeline"] > 1:  # each microbatch of the pipeline reads them anew
        reads *= workload.pipeline_microbatches(sizes) * workload.turns(sizes)
    return activations + reads * (passes + 1) * weights


def count_update_memory_traffic(workload: Workload, sizes: Sizes) -> float:
    """Return the bytes that the update reads and writes: the state, and the gradients twice."""
    state = sum(a.size * a.itemsize / a.parts(sizes) for a in state_arrays(workload))
    gradients = sum(4 * a.size / a.parts(sizes) for a in param_arrays(workload))
    return 2 * state + 2 * gradients
