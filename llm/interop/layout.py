"""How a file's tensors correspond to our parameters: tables of rows, used in both directions.

A row names both sides and their axes in the letters of DESIGN.md. Interop floor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set

import flax.traverse_util
import numpy as np

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, param_shapes

# param_shapes traces the model: rolled, so that depth costs nothing.
_ROLLED = ComputeConfig(unroll_layers=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file and the parameters of ours that it holds.

    Several of ours stand side by side on the last axis of theirs (GPT-2's fused projection). Axes
    are letters, one a dimension, and parentheses join letters into one dimension: "(NH)D" is N·H by
    D. "{layer}" in a name stands for the layer's number; our path is then within that layer.
    "{expert}" stands for the number of an expert: ours has all of them on its first axis, which the
    letters leave out.
    """

    theirs: str
    their_axes: str
    ours: str | tuple[str, ...]
    our_axes: str

    @property
    def ours_all(self) -> tuple[str, ...]:
        """The paths of our parameters, also where there is only one."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def in_layers(self) -> bool:
        """Whether there is one such tensor a layer."""
        return "{layer}" in self.theirs

    @property
    def in_experts(self) -> bool:
        """Whether there is one such tensor an expert."""
        return "{expert}" in self.theirs


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its row, its name and shape, and where its values live among ours."""

    row: Row
    name: str
    shape: tuple[int, ...]
    places: tuple[tuple[str, tuple[int, ...]], ...]  # path of our array, index of layer and expert


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """Return the size of every letter that rows may use; V is the true vocabulary."""
    return {
        "D": config.width,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "h": config.head_dim // 2,
        "r": 2,  # a rotary pair: H = r·h
        "F": config.mlp_width,
        "f": config.expert_mlp_width,
        "E": config.num_experts,
        "V": config.vocab_size,
        "T": config.max_length_tokens,
    }


def rearrange(array: np.ndarray, source: str, target: str, sizes: dict[str, int]) -> np.ndarray:
    """Return the array with axes as `source` says brought to the axes of `target`.

    >>> rearrange(np.arange(6).reshape(6, 1), "(NH)D", "DNH", {"N": 2, "H": 3, "D": 1}).shape
    (1, 2, 3)
    """
    source_letters, target_letters = _letters(source), _letters(target)
    split = array.reshape([sizes[letter] for letter in source_letters])
    moved = split.transpose([source_letters.index(letter) for letter in target_letters])
    return moved.reshape(shape_of(target, sizes))


def shape_of(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape that axes like "(NH)D" describe."""
    groups = re.findall(r"\((\w+)\)|(\w)", axes)
    return tuple(math.prod(sizes[letter] for letter in joined or one) for joined, one in groups)


def flat_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the model by its path, "cycle/layer_0/…"."""
    shapes = param_shapes(Transformer(config, _ROLLED))
    return {
        path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()
    }


def tensors(rows: Iterable[Row], config: TransformerConfig) -> list[Tensor]:
    """Return the tensors that a file of this model holds, layer by layer.

    A row whose parameter the model does not have (a bias, a free head) is left out.

    Raises:
      ValueError: the model has parameters that no row names.
    """
    shapes, sizes = flat_shapes(config), axis_sizes(config)
    found = [
        tensor for tensor in _all_tensors(rows, config, sizes) if tensor.places[0][0] in shapes
    ]
    covered = {path for tensor in found for path, _ in tensor.places}
    if covered != shapes.keys():
        left = ", ".join(sorted(shapes.keys() - covered))
        raise ValueError(f"the format has no place for these parameters of the model: {left}")
    return found


def load_params(
    rows: Iterable[Row],
    config: TransformerConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
) -> dict:
    """Return our parameters (float32 NumPy), reading one tensor of the file at a time.

    `shapes` are those of the tensors that the file holds, `source` is what errors call it.
    Vocabulary padding is added as zero rows.

    Raises:
      ValueError: tensors are missing, unexpected, or of another shape than the config says.
    """
    wanted, sizes = tensors(rows, config), axis_sizes(config)
    _check_names(wanted, shapes.keys(), source)
    for tensor in wanted:  # all of them, before anything takes the memory that the config asks for
        if tuple(shapes[tensor.name]) != tensor.shape:
            raise ValueError(
                f"{source}: tensor {tensor.name} has shape {tuple(shapes[tensor.name])}, but its "
                f"config says {tensor.shape}"
            )
    flat = {path: np.zeros(shape, np.float32) for path, shape in flat_shapes(config).items()}
    for tensor in wanted:
        values = read(tensor.name)
        parts = np.split(values, len(tensor.places), axis=-1)
        for part, (path, index) in zip(parts, tensor.places, strict=True):
            part = rearrange(part, tensor.row.their_axes, tensor.row.our_axes, sizes)
            goal = flat[path][index]
            goal[tuple(slice(size) for size in part.shape)] = part
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def check_params(config: TransformerConfig, params: dict) -> None:
    """Check that params are those of the config.

    Raises:
      ValueError: naming the parameters that are missing, too many, or of another shape.
    """
    flat, shapes = flax.traverse_util.flatten_dict(params, sep="/"), flat_shapes(config)
    differing = [
        f"{path} is {flat[path].shape if path in flat else 'absent'}, config says "
        f"{shapes.get(path, 'absent')}"
        for path in sorted(flat.keys() | shapes.keys())
        if path not in flat or path not in shapes or tuple(flat[path].shape) != shapes[path]
    ]
    if differing:
        raise ValueError("params do not belong to this config: " + _some(differing))


def read_param(tensor: Tensor, config: TransformerConfig, params: dict) -> np.ndarray:
    """Return one tensor of a file from our parameters, vocabulary padding removed.

    Only this tensor is copied to the host, so that an export never holds a second model.
    """
    sizes, parts = axis_sizes(config), []
    true_shape = shape_of(tensor.row.our_axes, sizes)
    for path, index in tensor.places:
        leaf = params
        for key in path.split("/"):
            leaf = leaf[key]
        part = np.asarray(leaf[index] if index else leaf)
        part = part[tuple(slice(size) for size in true_shape)]
        parts.append(rearrange(part, tensor.row.our_axes, tensor.row.their_axes, sizes))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _letters(axes: str) -> str:
    return axes.replace("(", "").replace(")", "")


def _all_tensors(rows, config, sizes) -> Iterator[Tensor]:
    rows = tuple(rows)
    layers = _layer_places(config)

    def each(row: Row, layer: int | None) -> Iterator[Tensor]:
        prefix, index = ("", ()) if layer is None else layers[layer]
        *front, last = shape_of(row.their_axes, sizes)
        shape = (*front, last * len(row.ours_all))
        for expert in range(config.num_experts) if row.in_experts else (None,):
            at = index if expert is None else (*index, expert)
            places = tuple((prefix + path, at) for path in row.ours_all)
            yield Tensor(row, row.theirs.format(layer=layer, expert=expert), shape, places)

    for row in rows:
        if not row.in_layers:
            yield from each(row, None)
    for layer in range(config.num_layers):
        for row in rows:
            if row.in_layers:
                yield from each(row, layer)


def _layer_places(config: TransformerConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Return, for each layer, the path it lives under and its index on the stacked axis."""
    places = [(f"prefix_{i}/", ()) for i in range(len(config.prefix_layers))]
    for cycle in range(config.num_cycles):
        places += [(f"cycle/layer_{j}/", (cycle,)) for j in range(len(config.cycle_layers))]
    return places


def _check_names(wanted: list[Tensor], names: Set[str], source: str) -> None:
    expected = {tensor.name for tensor in wanted}
    missing = [tensor.name for tensor in wanted if tensor.name not in names]
    unexpected = sorted(names - expected)
    if missing or unexpected:
        problems = [f"{len(missing)} tensors are missing: {_some(missing)}"] * bool(missing)
        problems += [f"{len(unexpected)} are unexpected: {_some(unexpected)}"] * bool(unexpected)
        raise ValueError(f"{source} does not hold the model of its config: {'; '.join(problems)}")


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
