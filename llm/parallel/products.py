"""FLOPs of the matrix products of a compiled program, and the kernels it calls. Ground floor.

XLA's own `cost_analysis` counts the body of a loop once; here a scanned layer counts L times.
"""

import math
import re
from collections import Counter

import jax
import numpy as np

from llm.parallel.hlo import Computation, Instruction, read_program


def count_product_flops(
    compiled: jax.stages.Compiled | str, open_turns: int | None = None
) -> float:
    """Return the FLOPs of dots, convolutions and ragged dots on one device, two a multiply-add.

    TPUs run dots as convolutions. Kernels (`kernel_calls`) are not looked into. Loops whose number
    of turns the program does not fix are taken to run `open_turns` times.

    Raises:
      ValueError: there is such a loop, and no number is given.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    counts = {"dot": _dot, "convolution": _convolution, "ragged-dot": _ragged_dot}
    total = 0.0
    for step in read_program(text).steps(open_turns):
        count = counts.get(step.instruction.opcode)
        if count is not None:
            total += step.count * count(step.instruction, step.computation)
    return total


def kernel_calls(
    compiled: jax.stages.Compiled | str, open_turns: int | None = None
) -> Counter[str]:
    """Return how often an execution calls each Pallas kernel of a TPU, by name; loops as there."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    calls = Counter()
    for step in read_program(text).steps(open_turns):
        if step.instruction.attribute(r'custom_call_target="(tpu_custom_call)"'):
            calls[re.sub(r"[.\d]+$", "", step.instruction.name)] += step.count
    return calls


def _dot(dot: Instruction, computation: Computation) -> float:
    left, _ = computation.operand_shapes(dot)
    summed = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    contracted = math.prod(left.dims[int(i)] for i in summed.split(",") if i)
    return 2.0 * math.prod(dot.shapes[0].dims) * contracted


def _ragged_dot(dot: Instruction, computation: Computation) -> float:
    rows, kernels, *_ = computation.operand_shapes(dot)  # [M K], [E K N]: a row meets one group
    return 2.0 * math.prod(rows.dims) * kernels.dims[-1]


def _convolution(conv: Instruction, computation: Computation) -> float:
    """Count the multiply-adds that meet no padding: of a dot made a convolution, the dot's."""
    left, right = computation.operand_shapes(conv)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes)
    of_left, of_right, of_out = labels.groups()
    window = conv.attribute(r"window=\{([^}]*)\}") or ""
    spatial = [letter for letter in of_right if letter.isdigit()]
    sizes = {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", window)}
    pairs, ones = 1, ["1"] * len(spatial)
    for i, letter in enumerate(sorted(spatial)):
        pairs *= _meetings(
            inputs=left.dims[of_left.index(letter)],
            outputs=conv.shapes[0].dims[of_out.index(letter)],
            window=int(sizes["size"][i]),
            stride=int(sizes.get("stride", ones)[i]),
            before=int(sizes["pad"][i].split("_")[0]) if "pad" in sizes else 0,
            spread=int(sizes.get("lhs_dilate", ones)[i]),
            gaps=int(sizes.get("rhs_dilate", ones)[i]),
        )
    # A kernel's input features are already those of one feature group; its output features are
    # those of all. Of batch groups each output feature meets one.
    batch = left.dims[of_left.index("b")]
    groups = int(conv.attribute(r"batch_group_count=(\d+)") or 1)
    features = right.dims[of_right.index("i")] * right.dims[of_right.index("o")]
    return 2.0 * batch / groups * features * pairs


def _meetings(*, inputs, outputs, window, stride, before, spread, gaps) -> int:
    """Return how many (output, window) places lie on an input: on no padding and in no hole."""
    places = np.arange(outputs)[:, None] * stride + np.arange(window) * gaps - before
    return int(((0 <= places) & (places < inputs * spread) & (places % spread == 0)).sum())
