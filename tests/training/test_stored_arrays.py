"""Arrays that processes write apart: a file a chunk, of which each process reads what it needs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.training import manifests
from llm.training.digests import array_digests, named_leaves
from llm.training.stored_arrays import (
    chunk_shapes,
    files_to_read,
    make_writer,
    nest,
    read_arrays,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Arrays over 4 × 2 devices, the directory they were written to, and a manifest of it."""
    path = epath.Path(tmp_path_factory.mktemp("saved")) / "1"
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("rows", "columns"))
    state = {
        "params": {
            "split": jnp.arange(64, dtype=jnp.float32).reshape(8, 8),
            "alike": jnp.arange(3, dtype=jnp.bfloat16),
        },
        "step": jnp.int32(7),
    }
    specs = {"split": PartitionSpec("rows", "columns"), "alike": PartitionSpec()}
    places = {"params": specs, "step": PartitionSpec()}
    state = jax.device_put(state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), places))
    named = named_leaves(state) | {"host": np.arange(5)}
    writer = make_writer(apart=True)
    writer.save(path, args=ocp.args.PyTreeSave(nest(named)))
    writer.close()
    arrays = {name: {"chunks": shape} for name, shape in chunk_shapes(path, named).items()}
    files = dict.fromkeys(manifests.step_files(path))
    return named, path, {"arrays": arrays, "files": files}


def test_what_is_written_apart_is_read_to_the_bit(saved):
    named, path, _ = saved
    assert array_digests(read_arrays(path, named)) == array_digests(named)


def test_each_process_reads_the_chunks_of_its_devices_and_all_that_is_no_chunk(saved):
    named, _, manifest = saved

    def seen_by(devices):
        def indices(x):
            found = x.sharding.devices_indices_map(x.shape)
            return lambda shape: {d: found[d] for d in devices}

        return {
            name: types.SimpleNamespace(
                shape=x.shape,
                sharding=types.SimpleNamespace(addressable_devices_indices_map=indices(x)),
            )
            if isinstance(x, jax.Array)
            else x
            for name, x in named.items()
        }

    read = [set(files_to_read(manifest, seen_by(jax.devices()[i : i + 2]))) for i in (0, 2, 4, 6)]
    for process, files in enumerate(read):
        left_out = manifest["files"].keys() - files
        assert left_out == {
            f"params.split/{row}.{column}"
            for row in range(4)
            for column in range(2)
            if row != process
        }
    assert manifest["files"].keys() > {"_METADATA", "params.split/.zarray", "step/0", "host/0"}
    # A process that has all devices reads all, and of a checkpoint of one process everybody does.
    assert files_to_read(manifest, named) == sorted(manifest["files"])
    bare = manifest | {"arrays": dict.fromkeys(named, {})}
    assert files_to_read(bare, seen_by(jax.devices()[:2])) == sorted(manifest["files"])
