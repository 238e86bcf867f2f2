"""A compiled program read from its text: which instruction runs, and how often. Ground floor.

XLA's own cost analysis counts the body of a loop once; here a scanned layer counts L times.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bits an element; what is not here (token, opaque) holds nothing.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "bf16": 16}
_TYPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and dimensions, `bf16[4,512]`."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        bits = _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return -(-math.prod(self.dims) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `attributes` is the text behind the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several where it is a tuple
    operands: tuple[str, ...]
    arguments: str  # the text between the parentheses: a constant's value, a parameter's number
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of a pattern in the attributes; None where there is no match."""
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def source(self) -> str:
        """The operation of the traced program that it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """The instructions of one computation, by name and in their order."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """Return the shapes of an instruction's operands, tuples laid open."""
        return tuple(s for name in instruction.operands for s in self.instructions[name].shapes)


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs `count` times in one execution of the program."""

    instruction: Instruction
    computation: Computation
    count: int
    fused: bool  # inside a fusion, whose parts are no instructions of their own


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations, and the one that is entered."""

    computations: Mapping[str, Computation]
    entry: str

    def steps(self, open_turns: int | None = None) -> Iterator[Step]:
        """Yield every instruction that runs, loops and calls followed; each branch counts once.

        Loops whose number of turns the program does not fix are taken to run `open_turns` times.

        Raises:
          ValueError: there is such a loop, and no number is given.
        """
        yield from self._steps(self.computations[self.entry], 1, False, (), open_turns)

    def _steps(
        self, computation, count: int, fused: bool, callers: tuple, open_turns: int | None
    ) -> Iterator[Step]:
        for instruction in computation.instructions.values():
            yield Step(instruction, computation, count, fused)
            turns, called = 1, ()
            match instruction.opcode:
                case "while":
                    called = _NAME.findall(instruction.attribute(r"\bbody=(%[\w.\-]+)") or "")
                    loop = (*callers, (computation, instruction))
                    turns = self._turns(instruction, loop, open_turns)
                case "conditional":
                    branches = r"(?:branch_computations=\{|true_computation=)([^}]*)"
                    called = _NAME.findall(instruction.attribute(branches) or "")
                case "fusion" | "async-start":
                    called = _NAME.findall(instruction.attribute(r"\bcalls=(%[\w.\-]+)") or "")
                case "call":
                    called = _NAME.findall(instruction.attribute(r"\bto_apply=(%[\w.\-]+)") or "")
            for name in called:
                yield from self._steps(
                    self.computations[name],
                    count * turns,
                    fused or instruction.opcode == "fusion",
                    (*callers, (computation, instruction)),
                    open_turns,
                )

    def _turns(self, loop: Instruction, callers: tuple, open_turns: int | None) -> int:
        """Return how often a loop's body runs."""
        known = _KNOWN_TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute(r"condition=%([\w.\-]+)")]
        compare, operands = _comparison(self, condition)
        if compare is not None:
            index, limit = (self._constant(condition, name, callers) for name in operands)
            direction = compare.attribute(r"direction=(\w+)")
            start, step = self._counter(condition, operands[0], callers)
            known = None not in (limit, start, step)
            if index is None and known and direction in ("LT", "LE"):
                return max(0, -(-(limit - start + (direction == "LE")) // step))
        if open_turns is not None:
            return open_turns
        raise ValueError(f"the loop {loop.name!r} has no number of turns that its program fixes")

    def _counter(self, condition, name: str, callers: tuple) -> tuple[int | None, int | None]:
        """Return a loop's counter before the first turn, and what each turn adds to it."""
        read = _without_copies(condition, name)
        if read.opcode != "get-tuple-element":
            return None, None
        outer, loop = callers[-1]
        start = self._element(outer, loop.operands[0], _index(read), callers[:-1])
        body = self.computations[loop.attribute(r"\bbody=%([\w.\-]+)")]
        after = _without_copies(body, body.root.name)
        if after.opcode != "tuple":
            return start, None
        added = _without_copies(body, after.operands[_index(read)])
        if added.opcode != "add":
            return start, None
        parts = [_without_copies(body, operand) for operand in added.operands]
        steps = [
            int(p.arguments) for p in parts if p.opcode == "constant" and p.arguments.isdigit()
        ]
        counts = [p for p in parts if p.opcode == "get-tuple-element" and _index(p) == _index(read)]
        return start, steps[0] if steps and counts and steps[0] > 0 else None

    def _constant(self, computation, name: str, callers: tuple) -> int | None:
        """Return the value of a scalar that is constant, or that a loop only carries along."""
        instruction = _without_copies(computation, name)
        if instruction.opcode == "constant":
            return int(instruction.arguments) if instruction.arguments.isdigit() else None
        if instruction.opcode != "get-tuple-element" or not callers:
            return None
        outer, caller = callers[-1]
        if caller.opcode != "while":
            return None
        body = self.computations[caller.attribute(r"\bbody=%([\w.\-]+)")]
        index = _index(instruction)
        root = _without_copies(body, body.root.name)
        if root.opcode != "tuple" or index >= len(root.operands):
            return None
        carried = _without_copies(body, root.operands[index])
        if carried.opcode != "get-tuple-element" or _index(carried) != index:
            return None  # the body changes it
        return self._element(outer, caller.operands[0], index, callers[:-1])

    def _element(self, computation, name: str, index: int, callers: tuple) -> int | None:
        made = _without_copies(computation, name)
        if made.opcode != "tuple":
            return None
        return self._constant(computation, made.operands[index], callers)


@functools.lru_cache(maxsize=1)  # one text is asked for its products, kernels and collectives
def read_program(text: str) -> Program:
    """Return the program that a compiled step's `as_text()` prints."""
    computations, entry, name, lines = {}, "", "", {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head[2], {}
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, lines)
        elif name:
            instruction = _read_line(line)
            if instruction is not None:
                lines[instruction.name] = instruction
    return Program(computations, entry)


def _read_line(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if found is None:
        return None
    root, name, rest = found.groups()
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _TYPE.findall(re.sub(r"\{[^{}]*\}", "", rest[: end + 1]))
    )
    opcode, rest = rest[end + 1 :].strip().split("(", 1)
    end = _closing(f"({rest}", 0) - 1
    operands = tuple(_NAME.findall(rest[:end])) if opcode != "constant" else ()
    return Instruction(name, opcode, shapes, operands, rest[:end], rest[end + 1 :], bool(root))


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"a parenthesis is left open in {text[:80]!r}")


def _without_copies(computation: Computation, name: str) -> Instruction:
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _index(element: Instruction) -> int:
    return int(element.attribute(r"\bindex=(\d+)"))


def _comparison(program: Program, condition: Computation):
    """Return a condition's comparison and its operands as the condition names them."""
    root = condition.root
    if root.opcode == "compare":
        return root, root.operands
    inner = program.computations.get(root.attribute(r"calls=%([\w.\-]+)") or "")
    if inner is None or inner.root.opcode != "compare":
        return None, ()
    numbers = [inner.instructions[name].arguments for name in inner.root.operands]
    if not all(number.isdigit() for number in numbers):
        return None, ()
    return inner.root, tuple(root.operands[int(number)] for number in numbers)
