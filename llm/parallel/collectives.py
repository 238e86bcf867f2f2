"""Which collectives a compiled program runs, over which mesh axes, moving what. Ground floor."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from llm.parallel.hlo import Computation, Instruction, Shape, Step, read_program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes along which devices exchange, in the mesh's order
    group: int  # devices that take part together
    bytes_a_device: int  # that a device sends each time, by a ring's count
    count: int  # times an execution of the program
    shape: str  # of what a device gives, bf16[512,64]
    source: str  # the operation of the traced program

    @property
    def total_bytes(self) -> int:
        """Bytes that a device sends in one execution of the program."""
        return self.bytes_a_device * self.count


def read_collectives(
    compiled: jax.stages.Compiled | str, mesh: Mesh, open_turns: int | None = None
) -> list[Collective]:
    """Return the collectives of a compiled program, or of its text, that move anything.

    Of n devices that take part each sends, of the bytes b it gives: all-gather (n−1)·b, all-reduce
    2·(n−1)/n·b, reduce-scatter and all-to-all (n−1)/n·b, permute b. A ragged all-to-all counts as
    if its buffer were full. Products that XLA runs in pieces, each beside a permute ("windowed
    einsum"), are permutes here: n−1 of them send what the all-gather would have sent. Loops whose
    number of turns the program does not fix are taken to run `open_turns` times.

    Raises:
      ValueError: there is such a loop, and no number is given.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    found = []
    for step in read_program(text).steps(open_turns):
        kind = _kind(step)
        if kind is not None:
            collective = _read(kind, step, mesh)
            if collective.axes and collective.bytes_a_device:
                found.append(collective)
    return found


def bytes_by_axes(collectives: Sequence[Collective]) -> dict[tuple[str, ...], int]:
    """Return the bytes that a device sends in one execution, by the axes along which it does."""
    sums = Counter()
    for collective in collectives:
        sums[collective.axes] += collective.total_bytes
    return dict(sums)


def _kind(step: Step) -> str | None:
    """Return the kind of collective that a step starts; None where it starts none."""
    instruction = step.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send":  # between TPU slices, through their hosts
        between = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        kind = between and between.lower().replace("_", "-")
    if kind not in KINDS:
        return None
    # The TPU runs a collective through a chain of fusions, each of which names it once more.
    chained = instruction.attribute(r'chain_id="(\d+)"') is not None
    starts = any(
        'custom_call_target="AsyncCollectiveStart"' in i.attributes
        for i in step.computation.instructions.values()
    )
    if step.fused and chained and not starts:
        return None
    # There a reduce-scatter is a fusion of an all-reduce with the slice that a device keeps.
    if step.fused and kind == "all-reduce" and "all-reduce-scatter" in step.computation.name:
        return "reduce-scatter"
    return kind


def _read(kind: str, step: Step, mesh: Mesh) -> Collective:
    instruction = step.instruction
    if instruction.opcode == "send":
        axes, group = _between_slices(mesh)
    elif kind == "collective-permute":
        pairs = _pairs(instruction)
        axes = _varying(mesh, pairs[pairs[:, 0] != pairs[:, 1]])
        group = 2
    else:
        groups = replica_groups(instruction.attributes, mesh.size)
        axes, group = _varying(mesh, groups), groups.shape[1]
    given = _given(kind, instruction, step.computation)
    num_bytes = sum(shape.num_bytes for shape in given)
    shares = {
        "all-gather": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    moved = round(num_bytes * shares.get(kind, (group - 1) / group))
    shape = "+".join(map(str, given))
    return Collective(kind, axes, group, moved, step.count, shape, instruction.source)


def _given(kind: str, instruction: Instruction, computation: Computation) -> Sequence[Shape]:
    """Return the shapes of what a device puts into a collective."""
    operands = [computation.instructions[name].shapes for name in instruction.operands]
    if instruction.opcode == "send":  # the other is a token
        return operands[0]
    if kind == "ragged-all-to-all":  # its other operands are the output and the offsets
        return operands[0]
    if kind == "collective-permute":
        slices = instruction.attribute(r"slice_sizes=\{\{([\d,]+)\}")
        if slices is not None:
            return [Shape(operands[0][0].dtype, tuple(map(int, slices.split(","))))]
        return operands[0]
    return [shape for shapes in operands for shape in shapes]


# ------------------------------------------------------------------------------- groups


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Return the groups of a collective as rows of devices' places in the mesh.

    All of XLA's notations: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,4]<=[4,2]T(1,0)`, and by axes of a
    mesh, `mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}`.

    Raises:
      ValueError: a notation that is none of these.
    """
    end = "(?:, use_global_device_ids|, dimensions=|, channel|$)"
    found = re.search(f"replica_groups=(.*?){end}", attributes)
    text = found[1] if found else "{}"
    if text.startswith("mesh["):
        return _groups_of_axes(text)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
    if text.startswith("{{"):
        return np.asarray([_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)])
    if text.startswith("{}"):
        return np.arange(num_devices)[None]
    raise ValueError(f"replica groups are written in a way that is not known: {text[:80]!r}")


def _groups_of_axes(text: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
    shape = tuple(sizes.values())
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text)
    devices = _iota(order[1], order[2]) if order else np.arange(math.prod(shape))
    devices = devices.reshape(shape)
    # An axis may be taken in part: 'a':(2)4 are 4 of its devices, after the first 2 major ones.
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?(?=[,}])", text.rsplit("{", 1)[1])
    if not any(part for _, _, part in chosen):
        taken = [list(sizes).index(name) for name, _, _ in chosen]
    else:
        shape, taken = [], []
        parts = {name: (int(before), int(size)) for name, before, size in chosen if size}
        for name, size in sizes.items():
            before, part = parts.get(name, (1, size))
            if name in {each for each, _, _ in chosen}:
                taken.append(len(shape) + 1)
            shape += [before, part, size // before // part]
        devices = devices.reshape(shape)
    group = math.prod(devices.shape[i] for i in taken)
    rest = [i for i in range(devices.ndim) if i not in taken]
    return devices.transpose(*rest, *taken).reshape(-1, group)


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _ints(dims)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _pairs(instruction: Instruction) -> np.ndarray:
    text = instruction.attribute(r"source_target_pairs=\{(\{.*?\})\}") or ""
    return np.asarray([_ints(pair) for pair in re.findall(r"\{([\d,]+)\}", text)]).reshape(-1, 2)


def _between_slices(mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that go from slice to slice, and how many slices there are."""
    of_slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    axes = tuple(axis for i, axis in enumerate(mesh.axis_names) if np.diff(of_slices, axis=i).any())
    return axes, len(np.unique(of_slices))


def _varying(mesh: Mesh, groups: np.ndarray) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ."""
    if not groups.size:
        return ()
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))
    differs = (places != places[..., :1]).any(axis=(1, 2))
    return tuple(axis for axis, varies in zip(mesh.axis_names, differs, strict=True) if varies)
