"""Bytes that a compiled training step holds on each device at its height. Third floor.

Counted as XLA lays a step out for accelerators, and held against its own account of compiled steps
(benchmarks/plans.py): the state, gradients and kept activations are in the program's shapes; of the
rest the largest of three moments counts.
"""

import dataclasses

from llm.scaling.traffic import worst_rows_per_token
from llm.scaling.work import muon_shares, rows_per_token
from llm.scaling.workload import (
    Sizes,
    Workload,
    batch_parts,
    kept_bytes_a_sequence,
    param_arrays,
    state_arrays,
)

_LANES = 128  # a TPU stores a vector's numbers over so many


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device by what they hold; `total` is their height, not all of them at once."""

    params: float
    optimizer: float
    gradients: float  # of a microbatch
    gradient_sum: float  # of several
    activations: float  # kept from the forward for the backward pass
    loss: float  # gathered head, its gradient, a tile's logits
    layer: float  # gathered weights and what a layer's backward pass works with
    update: float  # what the optimizer works with
    batch: float

    @property
    def total(self) -> float:
        """The most that lives at once: in the loss, a layer's backward pass, or the update."""
        always = self.params + self.optimizer + self.gradient_sum + self.batch
        inside = self.activations + max(self.loss, self.gradients + self.layer)
        return always + max(inside, self.gradients + self.update)


def count_step_memory(workload: Workload, sizes: Sizes) -> StepMemory:
    """Return what a step holds on a device."""
    arrays, params = state_arrays(workload), param_arrays(workload)
    local = sum(a.size / a.parts(sizes) for a in params)
    itemsize = workload.itemsize
    # The layers' parameters in the type that is computed in, made before the loop over layers.
    cast = itemsize * local if itemsize < 4 else 0.0
    return StepMemory(
        params=sum(a.size * a.itemsize / a.parts(sizes) for a in params),
        optimizer=sum(a.size * a.itemsize / a.parts(sizes) for a in arrays if not a.names),
        gradients=4 * local,  # float32
        gradient_sum=4 * local if workload.accumulate_steps > 1 else 0.0,
        activations=kept_bytes(workload, sizes) + cast,
        loss=_loss_bytes(workload, sizes),
        layer=_layer_bytes(workload, sizes),
        update=_update_bytes(workload, sizes),
        batch=5 * 4 * workload.tokens / batch_parts(sizes) / sizes["context"],
    )


def kept_bytes(workload: Workload, sizes: Sizes) -> float:
    """Return the activations kept for the backward pass, of all layers of a device; of a pipeline
    in each of its turns, idle ones too.

    Traced: what a second cycle of layers adds to a first, of one sequence, with the heads and
    features of one device.
    """
    config, g = workload.model, sizes["tensor"]
    cut = {
        name: getattr(config, name) // g
        for name in ("num_heads", "num_kv_heads", "mlp_width", "expert_mlp_width",
                     "shared_expert_width")
    }  # fmt: skip
    local = dataclasses.replace(config, **cut, vocab_size=_LANES, dropout_rate=0.0)
    compute = dataclasses.replace(workload.compute, unroll_layers=False)
    one, two = (
        kept_bytes_a_sequence(
            dataclasses.replace(local, prefix_layers=(), num_layers=n * len(config.cycle_layers)),
            compute,
            workload.length_tokens,
        )
        for n in (1, 2)
    )
    sequences = workload.microbatch_tokens(sizes) / workload.length_tokens
    layers = config.num_layers / sizes["pipeline"] * workload.turns(sizes)
    kept = (two - one) / len(config.cycle_layers) * sequences
    if workload.compute.remat not in ("none", "full"):
        # What the attention kernel gives is kept as it lies in a TPU, a head's numbers over lanes.
        padding = config.num_heads / g * (-config.head_dim % _LANES)
        kept += workload.microbatch_tokens(sizes) * padding * workload.itemsize
    return kept * layers


def _loss_bytes(workload: Workload, sizes: Sizes) -> float:
    """The head, whole in width; a tile's logits, in float32, and their gradient; hidden states, cut
    in tiles, and their gradient. The head's gradient comes when the logits have gone."""
    config, g, itemsize = workload.model, sizes["tensor"], workload.itemsize
    head = config.width * config.padded_vocab_size / g * itemsize
    tokens = workload.microbatch_tokens(sizes) / sizes["pipeline"]
    tile = tokens / workload.loss_tiles(sizes)
    logits = tile * config.padded_vocab_size / g * (4 + itemsize)
    return head + logits + 3 * tokens * config.width * itemsize


def _layer_bytes(workload: Workload, sizes: Sizes) -> float:
    """What a layer's backward pass works with: its weights, their gradients, its tokens.

    Weights are gathered a layer at a time, the next ones' while these are used. A pipeline gathers
    those of all its stage's layers before the first turn, and adds the gradients of each turn,
    whole, in float32, to those before; beside them microbatches wait for their turn, and their
    gradients.
    """
    config, stages, itemsize = workload.model, sizes["pipeline"], workload.itemsize
    layers = [a for a in param_arrays(workload) if "layers" in a.names]
    whole = sum(a.size / a.parts(sizes, without=("fsdp",)) for a in layers)
    tokens = workload.microbatch_tokens(sizes)
    working = tokens / workload.pipeline_microbatches(sizes) * _bytes_a_token(workload, sizes)
    if stages > 1:
        return (itemsize + 4 + 4) * whole + 2 * tokens * config.width * itemsize + working
    return 2 * whole / config.num_cycles * itemsize + working


def _bytes_a_token(workload: Workload, sizes: Sizes) -> float:
    """What is projected, the stream and its gradient; the kernel's float32 sum of each row of
    scores, which takes a vector of lanes; of experts the rows of their buffers, which have room for
    whatever comes where no token is dropped."""
    config, g, itemsize = workload.model, sizes["tensor"], workload.itemsize
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / g
    products = 3 if config.gated else 2
    wide = config.mlp_width if config.activation != "none" else 0
    if config.moe_layers:
        wide = config.shared_expert_width
    numbers = heads + products * wide / g + 2 * config.width
    if config.moe_layers:
        dropless = config.expert_capacity_factor is None
        rows = worst_rows_per_token(workload, sizes) if dropless else rows_per_token(workload)
        numbers += rows * (products * config.expert_mlp_width / g + 3 * config.width)
    return numbers * itemsize + 4 * _LANES * config.num_heads / g


def _update_bytes(workload: Workload, sizes: Sizes) -> float:
    """What Muon orthogonalises: a device's share of the largest stack of matrices, what they are
    exchanged from, and two products of them, in float32. Other optimizers work in place."""
    if workload.optimizer.name != "muon":
        return 0.0
    shares = muon_shares(workload, sizes)
    return 4 * 4 * max(share.matrices * share.size for share in shares)
