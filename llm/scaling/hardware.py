"""Published rates of chips, and how a slice of them is wired. Third floor: what plans and MFU count
with. Figures are the makers'; what a program reaches is less."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence

import jax

from llm.parallel.config import MESH_AXES, MeshConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, as JAX counts devices. Rates a second; links count one direction."""

    kinds: tuple[str, ...]  # how JAX names the device
    peak_flops: float  # dense bf16
    memory_bytes: float = 0.0
    memory_bytes_per_second: float = 0.0
    # Links to its neighbours: of a TPU two a dimension of the torus, of a GPU its NVLinks together.
    link_bytes_per_second: float = 0.0
    dimensions: int = 0  # of the torus; 0: all chips of a host reach each other through a switch
    # Of a dimension of this length (or its multiples) the ends are joined: it is a ring, others are
    # lines. Where `cubes`, by optical switches, which join all dimensions of such a slice or none.
    wraps_from: int = 0
    cubes: bool = False
    largest: tuple[int, ...] = ()  # slice
    network_bytes_per_second: float = 0.0  # between slices, or hosts of GPUs, a chip


# TPUs: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}. Their interconnect is given for both
# directions and all links of a chip together (v5e: 400 GB/s over 4 links); the network between
# slices a pod (v5e 6.4 Tb/s, v6e 25.6 Tb/s of 256 chips) or a chip (v5p 50 Gb/s). Memory is what
# programs get of it, which the compiler tells of one that does not fit: 15.75 and 31.25 GiB of 16
# and 32; of v5p's 95 GiB all. Of a link programs get nine tenths: jax-ml/scaling-book, tpus.md,
# commit 54e2c43, which says too where the ends of dimensions are joined.
# H100, H200: NVIDIA's data sheets of the SXM boards; NVLink 900 GB/s in both directions, one 400
# Gb/s network card a GPU as in a DGX or HGX host, eight GPUs a host.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,
        memory_bytes=15.75 * 2**30,
        memory_bytes_per_second=819e9,
        link_bytes_per_second=50e9,
        dimensions=2,
        wraps_from=16,
        largest=(16, 16),
        network_bytes_per_second=6.4e12 / 8 / 256,
    ),
    "v5p": Chip(
        kinds=("TPU v5p", "TPU v5"),
        peak_flops=459e12,
        memory_bytes=95 * 2**30,
        memory_bytes_per_second=2765e9,
        link_bytes_per_second=100e9,
        dimensions=3,
        wraps_from=4,
        cubes=True,
        largest=(16, 16, 24),
        network_bytes_per_second=50e9 / 8,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,
        memory_bytes=31.25 * 2**30,
        memory_bytes_per_second=1638e9,
        link_bytes_per_second=100e9,
        dimensions=2,
        wraps_from=16,
        largest=(16, 16),
        network_bytes_per_second=25.6e12 / 8 / 256,
    ),
    "h100": Chip(
        kinds=("H100",),
        peak_flops=989e12,
        memory_bytes=80e9,
        memory_bytes_per_second=3350e9,
        link_bytes_per_second=450e9,
        network_bytes_per_second=400e9 / 8,
    ),
    "h200": Chip(
        kinds=("H200",),
        peak_flops=989e12,
        memory_bytes=141e9,
        memory_bytes_per_second=4800e9,
        link_bytes_per_second=450e9,
        network_bytes_per_second=400e9 / 8,
    ),
    # Only for MFU.
    "a100": Chip(kinds=("A100",), peak_flops=312e12),
    "v4": Chip(kinds=("TPU v4",), peak_flops=275e12),
}
PLANNED = tuple(name for name, chip in CHIPS.items() if chip.memory_bytes)
_HOST_GPUS = 8


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Return the bf16 FLOPs a second of all devices together; None for a kind not in the table."""
    kind = devices[0].device_kind
    rates = {name: chip.peak_flops for chip in CHIPS.values() for name in chip.kinds}
    for name in sorted(rates, key=len, reverse=True):  # "TPU v5 lite" before "TPU v5"
        if name in kind:
            return rates[name] * len(devices)
    return None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are wired together, or several such slices joined by the data-centre network."""

    name: str
    chip_name: str
    shape: tuple[int, ...]  # of the torus; of GPUs their number
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def slice_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.slice_chips * self.num_slices

    @property
    def topology(self) -> str | None:
        """The name by which libtpu knows one slice; None for GPUs."""
        if not self.chip.dimensions:
            return None
        return f"{self.chip_name}:{'x'.join(map(str, self.shape))}"


def parse_slice(text: str) -> Slice:
    """Return the slice named v5e:16x16, v5p:8x8x8, v6e:16x16, h100:64, or 4*v5e:16x16.

    Raises:
      ValueError: no such chip or shape; names the nearest.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    examples = "slices are named v5e:16x16, v5p:8x8x8, v6e:16x16, h100:64, or 4*v5e:16x16 for four"
    if found is None:
        raise ValueError(f"slice {text!r}: {examples}")
    count, name, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if name not in PLANNED:
        near = difflib.get_close_matches(name, PLANNED, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"slice {text!r}: no chip {name!r}; {hint}{', '.join(PLANNED)} are known")
    chip, largest = CHIPS[name], "x".join(map(str, CHIPS[name].largest))
    if len(shape) != max(1, chip.dimensions):
        wanted = largest if chip.dimensions else "64, a number of chips"
        raise ValueError(
            f"slice {text!r}: {name} slices have {max(1, chip.dimensions)} dimension(s), as "
            f"{name}:{wanted}"
        )
    if min(shape) < 1 or count < 1:
        raise ValueError(f"slice {text!r}: sizes must be positive")
    longest = max(shape) <= max(chip.largest) if chip.largest and not chip.cubes else True
    if chip.largest and (not longest or math.prod(shape) > math.prod(chip.largest)):
        raise ValueError(
            f"slice {text!r}: the largest slice of {name} is {name}:{largest}; join several, as "
            f"2*{name}:{largest}"
        )
    return Slice(text.strip(), name, shape, count)


# ------------------------------------------------------------------------------- wiring


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How a mesh axis lies on a slice: the links that its collectives can use at once."""

    bytes_per_second: float  # that a device can send along it, in all directions together
    between_slices: bool = False


def wire_axes(where: Slice, mesh: MeshConfig) -> dict[str, Wiring]:
    """Return how each axis of a mesh lies, as `make_mesh` lays it: inner axes near.

    On a torus an axis takes whole dimensions where their product is its size, and then sends both
    ways round each ring. What is left takes parts of dimensions: lines, or interleaved rings that
    share their links. Of several slices one axis crosses from one to the next, through the
    network.

    Raises:
      ValueError: the sizes do not multiply to the slice's chips, or no axis can cross the slices.
    """
    crossing, sizes = mesh.within_slices(where.num_chips, where.num_slices)
    inner, found = dict(zip(MESH_AXES, sizes, strict=True)), {}
    if where.num_slices > 1:
        found[crossing] = Wiring(where.chip.network_bytes_per_second, between_slices=True)
    inside = _on_torus(where, inner) if where.chip.dimensions else _on_switch(where, inner)
    return inside | found


def _on_switch(where: Slice, sizes: Mapping[str, int]) -> dict[str, Wiring]:
    """Axes of GPUs, innermost first: inside a host by NVLink, beyond through all its cards."""
    chip, found, stride = where.chip, {}, 1
    for axis in reversed(MESH_AXES):
        size = sizes.get(axis, 1)
        if size == 1:
            continue
        inside = max(1, min(size, _HOST_GPUS // stride))
        if inside == size:
            found[axis] = Wiring(chip.link_bytes_per_second)
        else:  # each byte crosses once a host, by the cards of all its GPUs in the group
            rate = min(chip.link_bytes_per_second, inside * chip.network_bytes_per_second)
            found[axis] = Wiring(rate)
        stride *= size
    return found


def _on_torus(where: Slice, sizes: Mapping[str, int]) -> dict[str, Wiring]:
    chip, free, found = where.chip, list(where.shape), {}
    rings = _rings(chip, where.shape)
    waiting = [axis for axis in reversed(MESH_AXES) if sizes.get(axis, 1) > 1]
    for axis in waiting:
        whole = _whole_dimensions(free, sizes[axis])
        if whole:
            rates = [rings[i] for i in whole]
            found[axis] = Wiring(sum(rates))
            for i in whole:
                free[i] = 1
    strides = [1] * len(free)
    for axis in waiting:
        if axis in found:
            continue
        rate, left = 0.0, sizes[axis]
        for i in sorted(range(len(free)), key=lambda i: -math.gcd(free[i], left)):
            part = math.gcd(free[i], left)
            if part == 1:
                continue
            outermost = part == free[i]  # the last part of a dimension closes its ring
            full = rings[i] if outermost else chip.link_bytes_per_second
            rate += full / strides[i]  # groups that interleave share the links
            free[i], strides[i], left = free[i] // part, strides[i] * part, left // part
        found[axis] = Wiring(rate or chip.link_bytes_per_second)
    return found


def _rings(chip: Chip, shape: Sequence[int]) -> list[float]:
    """Return what a device can send along each dimension: both ways round a ring, one on a line."""
    joined = [length % chip.wraps_from == 0 for length in shape]
    if chip.cubes:
        joined = [all(joined)] * len(shape)
    return [chip.link_bytes_per_second * (2 if ring else 1) for ring in joined]


def _whole_dimensions(free: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the most dimensions whose product is the size; none where there are none."""
    candidates = [
        tuple(i for i in range(len(free)) if chosen >> i & 1) for chosen in range(1, 1 << len(free))
    ]
    fitting = [
        c
        for c in candidates
        if math.prod(free[i] for i in c) == size and all(free[i] > 1 for i in c)
    ]
    return max(fitting, key=len, default=())
