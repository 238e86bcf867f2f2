"""Bytes that a compiled training step holds on each device at its height. Third floor.

Counted as XLA lays a step out for accelerators, and held against its own account of compiled steps
(benchmarks/plans.py): the state, gradients and kept activations are in the program's shapes; of the
rest the largest of three moments counts.
"""

import dataclasses

from llm.scaling.traffic import is_muons, loss_tiles
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
    gradients: float  # of a microbatch, and their sum where there are several
    activations: float  # kept from the forward for the backward pass
    loss: float  # gathered head, its gradient, a tile's logits
    layer: float  # gathered weights and what a layer's backward pass works with
    update: float  # what the optimizer works with
    batch: float

    @property
    def total(self) -> float:
        """The most that lives at once: in the loss, a layer's backward pass, or the update."""
        always = self.params + self.optimizer + self.batch
        inside = self.activations + max(self.loss, self.layer)
        return always + self.gradients + max(inside, self.update)


def count_step_memory(workload: Workload, sizes: Sizes) -> StepMemory:
    """Return what a step holds on a device."""
    arrays, params = state_arrays(workload), param_arrays(workload)
    local = sum(a.size / a.parts(sizes) for a in params)
    itemsize = workload.itemsize
    # Of a microbatch, in float32; and, where there are several, their sum. Beside them the layers'
    # parameters in the type that is computed in, made before the loop over layers.
    several = workload.accumulate_steps > 1
    cast = sum(itemsize * a.size / a.parts(sizes) for a in params) if itemsize < 4 else 0.0
    return StepMemory(
        params=sum(a.size * a.itemsize / a.parts(sizes) for a in params),
        optimizer=sum(a.size * a.itemsize / a.parts(sizes) for a in arrays if not a.names),
        gradients=(4 + 4 * several) * local,
        activations=kept_bytes(workload, sizes) + cast,
        loss=_loss_bytes(workload, sizes, itemsize) - 4 * local,  # whose gradients come later
        layer=_layer_bytes(workload, sizes, itemsize),
        update=_update_bytes(workload, sizes),
        batch=5 * 4 * workload.tokens / batch_parts(sizes) / sizes["context"],
    )


def kept_bytes(workload: Workload, sizes: Sizes) -> float:
    """Return the activations kept for the backward pass, of all layers of a device.

    Traced: what a second cycle of layers adds to a first, of one sequence, with the heads and
    features of one device.
    """
    config, g = workload.model, sizes["tensor"]
    cut = {
        name: getattr(config, name) // g
        for name in ("num_heads", "num_kv_heads", "mlp_width", "expert_mlp_width")
        if getattr(config, name, 0)
    }
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
    rows = workload.batch_sequences / workload.accumulate_steps / batch_parts(sizes)
    cycles = config.num_layers / len(config.cycle_layers) / sizes["pipeline"]
    return (two - one) * cycles * rows / sizes["context"]


def _stream_bytes(workload: Workload, sizes: Sizes, itemsize: int) -> float:
    """Return the bytes of the residual stream of a device's part of a microbatch."""
    tokens = workload.tokens / workload.accumulate_steps / batch_parts(sizes) / sizes["context"]
    return tokens * workload.model.width * itemsize


def _loss_bytes(workload: Workload, sizes: Sizes, itemsize: int) -> float:
    """The head and its gradient, both whole in width; a tile's logits; hidden states, cut in tiles,
    and their gradient."""
    config, g = workload.model, sizes["tensor"]
    head = config.width * config.padded_vocab_size / g * itemsize
    tokens = workload.tokens / workload.accumulate_steps / batch_parts(sizes) / sizes["context"]
    tile = tokens / loss_tiles(workload, sizes)
    logits = tile * config.padded_vocab_size / g * 4
    return 2 * head + logits + 3 * _stream_bytes(workload, sizes, itemsize)


def _layer_bytes(workload: Workload, sizes: Sizes, itemsize: int) -> float:
    """A layer's weights gathered, the next one's under way, its gradients before they are
    scattered; and what its backward pass holds of its tokens."""
    config, g = workload.model, sizes["tensor"]
    layers = [a for a in param_arrays(workload) if "layers" in a.names]
    whole = sum(a.size / a.parts(sizes, without=("fsdp",)) for a in layers) / config.num_cycles
    tokens = workload.tokens / workload.accumulate_steps / batch_parts(sizes) / sizes["context"]
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / g
    wide = workload.active_mlp_width * (3 if config.gated else 2) / g
    # what is projected, the stream and its gradient; the kernel's float32 sum of each row of
    # scores, which takes a vector of lanes
    a_token = (heads + wide + 2 * config.width) * itemsize + 4 * _LANES * config.num_heads / g
    return 2 * whole * itemsize + tokens * a_token


def _update_bytes(workload: Workload, sizes: Sizes) -> float:
    """What Muon orthogonalises: the compiler gathers every matrix whole, in bfloat16, and works on
    the largest stack of them at once; the parts of the update between its steps are float32. Other
    optimizers work in place."""
    if workload.optimizer.name != "muon":
        return 0.0
    matrices = [array for array in param_arrays(workload) if is_muons(array)]
    largest = max(array.size for array in matrices)
    gathered = sum(array.size for array in matrices if array.parts(sizes) > 1)
    local = sum(array.size / array.parts(sizes) for array in matrices)
    return 2 * (gathered + largest) + 4 * 4 * local
