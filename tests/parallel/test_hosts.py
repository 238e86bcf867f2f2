"""Which rows each process loads: told by where its devices stand on the mesh."""

import dataclasses
import math

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from llm.parallel.config import MESH_AXES, MeshConfig
from llm.parallel.hosts import HostShare, host_share
from llm.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks of one that need not be here."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def shares(config, num_processes, num_devices=8):
    """Return each process's share, its devices being neighbours."""
    each = num_devices // num_processes
    devices = [Device(i, i // each) for i in range(num_devices)]
    sizes = config.sizes(num_devices)
    mesh = Mesh(
        np.array(devices, dtype=object).reshape(sizes),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )
    return [tuple(host_share(mesh, process)) for process in range(num_processes)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), [(0, 4, True), (1, 4, True), (2, 4, True), (3, 4, True)]),
        (MeshConfig(fsdp=2, tensor=4), [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),
        (MeshConfig(data=1, tensor=8), [(0, 1, True), *[(0, 1, False)] * 3]),
        (MeshConfig(data=1, pipeline=8), [(i, 4, True) for i in range(4)]),
        (MeshConfig(data=2, context=4), [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),
    ],
    ids=str,
)
def test_processes_load_what_their_devices_hold(config, expected):
    assert shares(config, 4) == expected


def test_shares_that_overlap_in_part_are_refused():
    with pytest.raises(ValueError, match="2 processes hold rows of a batch partly in common"):
        shares(MeshConfig(data=3, tensor=2), 2, num_devices=6)


def test_a_share_of_rows():
    rows = np.arange(12)
    parts = [HostShare(index, 3).of(rows) for index in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), rows)


@pytest.mark.parametrize(
    ("config", "crossing"),
    [
        (MeshConfig(data=4, tensor=2), "data"),
        (MeshConfig(data=1, fsdp=4, tensor=2), "fsdp"),
        (MeshConfig(data=1, pipeline=4, tensor=2), "pipeline"),
        (MeshConfig(data=2, pipeline=2, tensor=2, across_slices="pipeline"), "pipeline"),
    ],
    ids=str,
)
def test_one_axis_alone_crosses_slices(config, crossing, monkeypatch):
    """Along every other axis neighbours are of one slice."""
    monkeypatch.setattr("llm.parallel.mesh._arrange", lambda d, sizes: np.array(d).reshape(sizes))
    devices = [Device(i, 0, slice_index=i // 4, platform="tpu") for i in range(8)]
    mesh = make_mesh(config, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for place, axis in enumerate(MESH_AXES):
        changes = np.diff(slices, axis=place).any()
        assert changes == (axis == crossing)


def test_slices_that_no_axis_can_cross():
    with pytest.raises(ValueError, match="3 slices divide none of mesh.data=2, mesh.pipeline=1"):
        MeshConfig(data=2, tensor=3).within_slices(6, 3)


def test_sizes_within_a_slice():
    axis, sizes = MeshConfig(data=4, fsdp=8, tensor=2).within_slices(64, 4)
    assert axis == "data" and sizes == (1, 8, 1, 1, 1, 2)
    assert math.prod(sizes) == 16
