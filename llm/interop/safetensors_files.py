"""Safetensors on disk: one file or shards with an index, read and written a tensor at a time."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from llm.data.disk import read_json_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class SafetensorsReader:
    """The tensors of a Hugging Face directory, by name, whichever file each is in."""

    def __init__(self, files: dict[str, "safetensors.safe_open"], where: dict[str, str]):
        self._files = files
        self._where = where

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return one tensor's shape."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the type in which it is stored."""
        file = self._files[self._where[name]]
        stored = file.get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise ValueError(
                f"{self._where[name]}: tensor {name} is stored as {stored}; supported: "
                f"{', '.join(_FLOATS)}"
            )
        return file.get_tensor(name)


@contextlib.contextmanager
def open_safetensors(directory: pathlib.Path) -> Iterator[SafetensorsReader]:
    """Yield a reader of the weights in a directory.

    Raises:
      FileNotFoundError: there are none, or the index names a file that is not there.
      ValueError: a file is damaged, or is not what the index says.
    """
    with contextlib.ExitStack() as stack:
        if (directory / INDEX).is_file():
            where = _read_index(directory)
        elif (directory / WEIGHTS).is_file():
            where = None
        else:
            raise FileNotFoundError(_no_weights(directory))
        names = sorted(set(where.values())) if where is not None else [WEIGHTS]
        files = {name: stack.enter_context(open_file(directory / name)) for name in names}
        held = {tensor: name for name, file in files.items() for tensor in file.keys()}
        for tensor, name in (where or {}).items():
            if tensor not in files[name].keys():
                raise ValueError(
                    f"{directory / INDEX} says that {name} holds {tensor}, but it does not; "
                    "fetch the directory again"
                )
        yield SafetensorsReader(files, held)


def write_safetensors(
    directory: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write tensors to one file, or to shards of at most that many bytes with an index.

    Only the tensors of one shard are in memory at a time; a tensor larger than a shard gets one of
    its own.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be positive")
    itemsize = DTYPES[dtype].itemsize
    sizes = {name: int(np.prod(shape)) * itemsize for name, shape in shapes.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    where = {}
    for i, names in enumerate(shards):
        file = (
            WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        arrays = {name: np.ascontiguousarray(read(name), DTYPES[dtype]) for name in names}
        # readers ask this key which framework's layout the file has
        safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _read_index(directory: pathlib.Path) -> dict[str, str]:
    path = directory / INDEX
    index = read_json_object(path)
    try:
        where = index["weight_map"]
        names = set(where.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
    for name in names:
        # an index from elsewhere must not point at files outside of its directory
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"{path} names the file {name!r}, which is not in its directory")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{path} names {name}, which is not there; fetch it, too")
    return where


def open_file(path: pathlib.Path) -> "safetensors.safe_open":
    """Open one file; the library checks that all of its header lies in the file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); fetch it again"
        ) from error


def _no_weights(directory: pathlib.Path) -> str:
    message = f"{directory} holds neither {WEIGHTS} nor {INDEX}"
    others = sorted(path.name for path in directory.glob("*.bin"))
    if others:
        message += (
            f", but {others[0]}, a pickle that could run code when read; save the model again with "
            "transformers' save_pretrained(…, safe_serialization=True)"
        )
    return message
