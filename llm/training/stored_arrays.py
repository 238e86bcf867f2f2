"""Between a state and what Orbax stores: arrays by path, in nested dicts of strings.
So a checkpoint can be read in part, by a reader that knows nothing of the optimizer."""

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.handlers import base_pytree_checkpoint_handler  # it has no public name

from llm.training.digests import combine_digests
from llm.training.manifests import CorruptStepError, shorten


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dicts of values named by path: {"a/b": x} → {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def below(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values whose path starts with the prefix, which is cut off."""
    return {name[len(prefix) :]: x for name, x in named.items() if name.startswith(prefix)}


def params_digest(digests: Mapping[str, str], subtree: str = "params") -> str | None:
    """Return `tree_digest` of a state's parameters, from the checksums of all its arrays."""
    found = below(digests, f"{subtree}/")
    return combine_digests(found) if found else None


def check_structure(manifest: dict[str, Any], wanted: Mapping[str, Any], path: epath.Path) -> None:
    """Raise where the arrays wanted are not those of the checkpoint.

    Raises:
      ValueError: names, shapes or dtypes differ; some of them are listed.
    """
    stored = manifest["arrays"]
    wrong = [f"{name} is missing from the checkpoint" for name in wanted if name not in stored]
    wrong += [f"{name} is only in the checkpoint" for name in stored if name not in wanted]
    for name in wanted:
        if name in stored:
            have = (stored[name]["dtype"], tuple(stored[name]["shape"]))
            want = (str(wanted[name].dtype), tuple(np.shape(wanted[name])))
            if have != want:
                wrong.append(f"{name} is {have[0]}{have[1]} there but {want[0]}{want[1]} here")
    if wrong:
        raise ValueError(
            f"{path} holds another state than this run's: {shorten(wrong)}. "
            "Use the config that the workdir was made with, or another workdir"
        )


class _Unmerged(base_pytree_checkpoint_handler.BasePyTreeCheckpointHandler):
    def finalize(self, directory: epath.Path) -> None:
        """Do nothing: there is nothing to merge, of which Orbax would warn at every save."""


def make_writer(*, apart: bool) -> ocp.AsyncCheckpointer:
    """Return what saves steps, with all processes in one directory or each `apart` in its own.

    Apart, each writes a file for each chunk of an array that is its to write, and the first one all
    that describes the arrays: their directories together are one step. All write the marks of a
    whole directory, which lie beside those of the arrays.
    """
    if not apart:
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    # Without a record of each process's share of an array: the processes would wait for the first
    # one to make its directory. The registry of all has one that all handlers share and change.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.number, ocp.type_handlers.ScalarHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(
            handler_impl=_Unmerged(use_ocdbt=False, type_handler_registry=registry)
        ),
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=None),
    )


def chunk_shapes(path: epath.Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return the shapes of the chunks in which arrays were written apart."""
    return {
        name: json.loads((path / _folder(name) / ".zarray").read_text())["chunks"] for name in names
    }


def files_to_read(manifest: dict[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the files of a step that this process needs for the values wanted.

    Of arrays written apart these are the chunks that its devices hold a part of; else all files.
    """
    needed, arrays = set(), {}
    for name, value in wanted.items():
        chunk_shape = manifest["arrays"].get(name, {}).get("chunks")
        if chunk_shape is not None and _placed(value):
            arrays[_folder(name)] = name
            needed.update(f"{_folder(name)}/{chunk}" for chunk in _chunks(value, chunk_shape))
    return [
        file
        for file in sorted(manifest["files"])
        if file in needed or file.endswith("/.zarray") or file.rpartition("/")[0] not in arrays
    ]


def _chunks(value: Any, chunk_shape: list[int]) -> set[str]:
    """Return the names of the chunks that this process's devices hold a part of."""
    found = set()
    for index in value.sharding.addressable_devices_indices_map(tuple(value.shape)).values():
        places = []
        for cut, size, chunk in zip(index, value.shape, chunk_shape, strict=False):
            start, stop, _ = cut.indices(size)
            places.append(range(start // chunk, -(-stop // chunk)))
        found.update(".".join(map(str, place)) or "0" for place in itertools.product(*places))
    return found


def _folder(name: str) -> str:
    """Return the directory in which Orbax puts the chunks of an array."""
    return name.replace("/", ".")


def read_arrays(path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read arrays of a step, each as the value wanted under its path is.

    An array with a sharding comes with that sharding; NumPy arrays come as NumPy arrays; arrays
    that JAX has not committed to a device come uncommitted.

    Raises:
      CorruptStepError: the files, or some of these arrays in them, cannot be read.
    """

    def restore_args(value: Any) -> ocp.RestoreArgs:
        if _placed(value):
            return ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=value.sharding, global_shape=value.shape
            )
        return ocp.RestoreArgs(restore_type=np.ndarray)

    args = nest({name: restore_args(value) for name, value in wanted.items()})
    item = jax.tree.map(lambda _: 0, args)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restoring = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        try:
            tree = reader.restore(path, args=restoring)
            read = {name: _lookup(tree, name) for name in wanted}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            text = " ".join(str(error).split())
            raise CorruptStepError(f"its arrays cannot be read: {text:.300}") from error
    # Orbax gives the placeholder back for an array that it does not find.
    absent = [name for name, x in read.items() if not isinstance(x, np.ndarray | jax.Array)]
    if absent:
        raise CorruptStepError(f"its files do not hold {shorten(absent)}")
    return {
        name: read[name] if isinstance(value, np.ndarray) else jnp.asarray(read[name])
        for name, value in wanted.items()
    }


def _placed(value: Any) -> bool:
    """Return whether a wanted value says on which devices it is to lie."""
    if isinstance(value, jax.Array):
        return value.committed
    return getattr(value, "sharding", None) is not None


def _lookup(tree: Any, name: str) -> Any:
    for key in name.split("/"):
        tree = tree[key]
    return tree
