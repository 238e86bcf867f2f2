"""Which rows of a global batch each process loads, and how they meet on the mesh. Ground floor."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.parallel.rules import batch_sharding, mesh_axes, partition_spec, ways

Batch = dict[str, Any]  # arrays with a row a sequence, and scalars


class HostShare(NamedTuple):
    """A process loads the `index`-th of `count` equal parts of each global batch.

    Processes whose devices hold the same rows, as those along tensor or pipeline do, load the same.
    """

    index: int
    count: int
    first: bool = True  # of those that load the same, the one that writes for them

    def of(self, rows: Any) -> Any:
        """Return this part of a sequence that all processes have whole."""
        each = len(rows) // self.count
        return rows[self.index * each :][:each]


WHOLE = HostShare(0, 1)


@functools.lru_cache(maxsize=64)  # asked for every batch; a walk over all devices
def host_share(mesh: Mesh, process: int | None = None) -> HostShare:
    """Return what a process, by default this one, loads for the mesh.

    Raises:
      ValueError: processes hold rows partly in common.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    parts = {index: _parts_of(mesh, index) for index in processes}
    shares = sorted(set(parts.values()))
    if sum(map(len, shares)) != ways(mesh, "activation_batch") or len(set(map(len, shares))) > 1:
        raise ValueError(
            f"on a mesh of {dict(mesh.shape)}, {len(parts)} processes hold rows of a batch partly "
            "in common; choose axes that each process's devices fill, or that fill them"
        )
    process = jax.process_index() if process is None else process
    first = min(index for index, held in parts.items() if held == parts[process])
    return HostShare(shares.index(parts[process]), len(shares), process == first)


def check_batch(batch: Batch, mesh: Mesh, num_shares: int = 1) -> None:
    """Raise a ValueError where the mesh does not divide a batch, of which this is one share."""
    parts, stretches = ways(mesh, "activation_batch"), ways(mesh, "activation_length")
    for size in {np.shape(x)[0] * num_shares for x in batch.values() if np.ndim(x)}:
        if size % parts:
            raise ValueError(
                f"a batch of {size} does not divide over the {parts} devices of mesh.data × "
                "mesh.fsdp × mesh.expert × mesh.pipeline; choose another batch or mesh"
            )
    if "tokens" in batch and batch["tokens"].shape[1] % stretches:
        raise ValueError(
            f"rows of {batch['tokens'].shape[1]} do not divide over mesh.context={stretches} "
            "devices; choose another length or mesh"
        )


def place_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the global batch of which each host gives its share of the rows.

    Raises:
      ValueError: the mesh does not divide the batch.
    """
    check_batch(batch, mesh, host_share(mesh).count)
    shardings = {name: batch_sharding(mesh, np.shape(x)) for name, x in batch.items()}
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)  # sooner than one by one
    return {name: _place(np.asarray(x), shardings[name], mesh) for name, x in batch.items()}


def local_rows(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """Return the rows of a global array that are this process's share of a batch."""
    if jax.process_count() == 1:
        return np.asarray(x)
    rows = _by_rows(mesh)(x)  # however the compiler has left it
    shards = {shard.index[0].start or 0: shard.data for shard in rows.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _place(x: np.ndarray, sharding: NamedSharding, mesh: Mesh) -> jax.Array:
    if not x.ndim:
        return jax.make_array_from_callback((), sharding, lambda index: x)
    mine = _parts_of(mesh, jax.process_index())
    each = len(x) // len(mine)  # rows a part

    def piece(index):
        place = mine.index((index[0].start or 0) // each)
        return x[place * each : (place + 1) * each][(slice(None), *index[1:])]

    shape = len(x) * host_share(mesh).count, *x.shape[1:]
    return jax.make_array_from_callback(shape, sharding, piece)


@functools.lru_cache(maxsize=1024)  # as is this
def _parts_of(mesh: Mesh, process: int) -> tuple[int, ...]:
    """Return which of the parts that the mesh cuts a batch into a process's devices hold."""
    axes = [mesh.axis_names.index(axis) for axis in mesh_axes("activation_batch")]
    holders = np.moveaxis(mesh.devices, axes, range(len(axes)))
    holders = holders.reshape(ways(mesh, "activation_batch"), -1)
    return tuple(
        part for part, row in enumerate(holders) if any(d.process_index == process for d in row)
    )


@functools.lru_cache(maxsize=8)
def _by_rows(mesh: Mesh):
    rows = NamedSharding(mesh, PartitionSpec(*partition_spec(("activation_batch",))))
    return jax.jit(lambda x: x, out_shardings=rows)
