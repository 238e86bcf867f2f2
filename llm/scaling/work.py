"""FLOPs that a step runs, by closed forms. Third floor."""

import dataclasses
import math

from llm.models.capacity import capacity_of
from llm.models.config import ComputeConfig, TransformerConfig
from llm.scaling.workload import (
    Sizes,
    StateArray,
    Workload,
    cached_flops,
    cached_training_flops,
    param_arrays,
)

_SPLASH_BLOCK = 512  # llm/models/splash.py
_FLASH_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step of all devices together, by what computes them."""

    model: float  # forward and backward by the convention of MFU
    products: float  # matrix products, with what rematerialisation repeats and idle stages compute
    grouped: float  # of the products, those of ragged groups of rows: a kernel's on TPUs
    attention: float  # kernels, with what they compute of masked scores
    optimizer: float  # products of the optimizer's (Muon's orthogonalisation)

    @property
    def executed(self) -> float:
        return self.products + self.attention + self.optimizer

    @property
    def outside_of_kernels(self) -> float:
        """What `count_product_flops` finds in a step compiled for TPUs."""
        return self.products - self.grouped + self.optimizer


def count_work(workload: Workload, sizes: Sizes, platform: str = "tpu") -> Work:
    """Return the FLOPs of a step on "tpu" or "gpu".

    A pipeline's stages compute in each turn, in those in which they have nothing to do too.
    """
    config, length = workload.model, workload.length_tokens
    turns = workload.turns(sizes)
    head = cached_flops(config, length).head * 3
    layers = _layer_products(workload) * turns
    dropless = config.expert_capacity_factor is None
    a_token = attention_flops(config, workload.compute, length, platform)
    return Work(
        model=cached_training_flops(config, length) * workload.tokens,
        products=(layers + head) * workload.tokens,
        grouped=_expert_products(workload) * turns * workload.tokens * dropless,
        attention=a_token * workload.tokens * turns,
        optimizer=_muon_flops(workload, sizes) if workload.optimizer.name == "muon" else 0.0,
    )


def grouped_flops(
    config: TransformerConfig, compute: ComputeConfig, *, backward: bool = True, learn: bool = True
) -> float:
    """Return the FLOPs a token of the products of experts that drop none, which are kernels' on
    TPUs: of a forward pass and a backward one, without gradients of weights that do not learn."""
    if config.expert_capacity_factor is not None:
        return 0.0
    passes = _expert_passes(compute, backward=backward, learn=learn)
    return passes * _expert_forward(config, config.experts_per_token)


def _expert_forward(config: TransformerConfig, rows: float) -> float:
    """Return the FLOPs a token of a forward pass through so many routed experts."""
    products = 3 if config.gated else 2
    return 2.0 * config.moe_layers * rows * products * config.width * config.expert_mlp_width


def _expert_passes(compute: ComputeConfig, *, backward: bool = True, learn: bool = True) -> int:
    if not backward:
        return 1
    # The last product is repeated too: the gates' gradients ask for its result.
    return 2 + learn + (compute.remat in ("full", "attention"))


def rows_per_token(workload: Workload) -> float:
    """Return how many rows experts compute for each token: those chosen, or, where experts have a
    capacity, all of their buffers."""
    config = workload.model
    if config.expert_capacity_factor is None:
        return config.experts_per_token
    capacity = capacity_of(config, workload.length_tokens)
    return config.num_experts * capacity / workload.length_tokens


def _expert_products(workload: Workload) -> float:
    """Return the FLOPs a token of the products of routed experts, all passes."""
    if not workload.model.moe_layers:
        return 0.0
    forward = _expert_forward(workload.model, rows_per_token(workload))
    return _expert_passes(workload.compute) * forward


def _layer_products(workload: Workload) -> float:
    """Return the FLOPs a token of the products of all layers, all passes."""
    dense = cached_flops(workload.model, workload.length_tokens).projections
    dense -= _expert_forward(workload.model, workload.model.experts_per_token)
    return dense * (3 + repeated_share(workload)) + _expert_products(workload)


def repeated_share(workload: Workload) -> float:
    """Return which share of the forward products outside of experts the backward pass repeats.

    The last product of a layer is not: nothing in the backward pass asks for its result.
    """
    if workload.compute.remat not in ("full", "attention"):
        return 0.0
    kernels = [
        a
        for a in param_arrays(workload)
        if a.name.endswith("kernel") and "vocab" not in a.names and not _is_experts(a)
    ]
    last = "down" if workload.model.activation != "none" else "out"
    total = sum(a.size for a in kernels)
    return 1.0 - sum(a.size for a in kernels if f"/{last}/" in a.name) / total


def _is_experts(array: StateArray) -> bool:
    return "experts" in array.names


def attention_flops(
    config: TransformerConfig,
    compute: ComputeConfig,
    length: int,
    platform: str = "tpu",
    *,
    backward: bool = True,
) -> float:
    """Return what the platform's kernel computes of a token in a forward pass, and a backward one.

    A forward pass is two products. Splash's backward is seven: three for the queries, four for keys
    and values, of which two each are the scores and their gradient again; FlashAttention's, as
    cuDNN's, is five (Dao 2023, arXiv:2307.08691, section 4.1). Rematerialisation runs the forward
    once more, unless it keeps all that the backward asks for. Blocks that the mask hides are left
    out.
    """
    passes, block = (3.5, _SPLASH_BLOCK) if platform == "tpu" else (2.5, _FLASH_BLOCK)
    again = ("full",) if platform == "tpu" else ("full", "dots", "dots_with_no_batch", "attention")
    runs = 1.0 + backward * (passes + (compute.remat in again))
    whole = cached_flops(config, length, causal_half=False).attention
    return runs * whole * _visited_share(config, length, block)


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


# --------------------------------------------------------------------------------- Muon


@dataclasses.dataclass(frozen=True)
class Share:
    """A device's share of an array of matrices that Muon orthogonalises (llm/training/muon.py)."""

    matrices: int  # whole ones
    size: int  # of one
    smaller: int  # side
    cuts: tuple[str, ...]  # mesh axes along which parts are exchanged


def muon_shares(workload: Workload, sizes: Sizes) -> list[Share]:
    """Return what a device orthogonalises."""
    return [_muon_share(a, sizes) for a in param_arrays(workload) if _is_muons(a)]


def _is_muons(array: StateArray) -> bool:
    """Whether Muon updates a parameter: a matrix inside a layer (llm/training/optimizers.py)."""
    matrix = array.name.endswith("kernel") and "embed" in array.names
    return matrix and not {"vocab", "router"} & set(array.names)


def _muon_share(array: StateArray, sizes: Sizes) -> Share:
    dims = list(zip(array.names, array.shape, array.axes, strict=True))
    stacked = [dim for dim in dims if dim[0] in ("layers", "experts")]
    sides = [dim for dim in dims if dim not in stacked]
    here = math.prod(n // math.prod(sizes[a] for a in axes) for _, n, axes in stacked)
    cuts = tuple(axis for *_, axes in sides for axis in axes if sizes[axis] > 1)
    size = math.prod(n for _, n, _ in sides)
    width = math.prod(n for name, n, _ in sides if name == "embed")
    devices = math.prod(sizes[axis] for axis in cuts)
    return Share(-(-here // devices), size, min(width, size // width), cuts)


def _muon_flops(workload: Workload, sizes: Sizes) -> float:
    """Five Newton–Schulz steps of a matrix of m rows and n ≥ m columns: 4·m²·n + 2·m³ each.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; optax.contrib.muon's default.
    """
    one = lambda share: 5 * (4 * share.smaller * share.size + 2 * share.smaller**3)  # noqa: E731
    of_device = sum(share.matrices * one(share) for share in muon_shares(workload, sizes))
    return of_device * math.prod(sizes.values())
