"""Slices are named as their makers name them, and wired as their topologies say."""

import pytest

from llm.parallel.config import MeshConfig
from llm.scaling.hardware import CHIPS, PLANNED, parse_slice, wire_axes


def rates(text, across_slices="auto", **sizes):
    mesh = MeshConfig(**({"data": 1} | sizes), across_slices=across_slices)
    return {a: w.bytes_per_second for a, w in wire_axes(parse_slice(text), mesh).items()}


@pytest.mark.parametrize(
    ("text", "chips", "topology"),
    [
        ("v5e:16x16", 256, "v5e:16x16"),
        ("v5p:8x8x8", 512, "v5p:8x8x8"),
        ("V6E:4x8", 32, "v6e:4x8"),
        ("4*v5e:16x16", 1024, "v5e:16x16"),
        ("h100:64", 64, None),
    ],
)
def test_slices_are_read(text, chips, topology):
    where = parse_slice(text)
    assert (where.num_chips, where.topology) == (chips, topology)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:4x4", "did you mean v5[ep]\\? v5e, v5p, v6e, h100"),
        ("v5e:16", "2 dimension.*v5e:16x16"),
        ("v5p:16x16", "3 dimension"),
        ("v5e:32x32", r"largest slice of v5e is v5e:16x16; join several, as 2\*v5e:16x16"),
        ("a pod", "slices are named"),
        ("v4:4x4x4", "no chip 'v4'"),
    ],
)
def test_what_is_no_slice_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        parse_slice(text)


def test_links_add_up_to_what_the_makers_publish():
    """Both directions of all links: 400, 1,200 and 800 GB/s a chip of v5e, v5p and v6e
    (cloud.google.com/tpu/docs), 900 of an H100's NVLink (its data sheet)."""
    published = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "h100": 900e9, "h200": 900e9}
    for name in PLANNED:
        chip = CHIPS[name]
        links = 2 * chip.dimensions or 1
        assert 2 * links * chip.link_bytes_per_second == published[name]


def test_axes_take_whole_dimensions_and_their_rings():
    # a ring a dimension, both ways round: 2 × 100 GB/s
    assert rates("v5p:8x8x8", fsdp=64, tensor=8) == {"tensor": 200e9, "fsdp": 400e9}
    assert rates("v5p:4x4x4", fsdp=64) == {"fsdp": 600e9}
    assert rates("v5e:16x16", fsdp=256) == {"fsdp": 200e9}
    # dimensions of a small slice of v5e do not close: lines of 50 GB/s
    assert rates("v5e:4x4", data=4, fsdp=4) == {"data": 50e9, "fsdp": 50e9}


def test_parts_of_dimensions_are_lines_and_share_links():
    found = rates("v5e:16x16", fsdp=64, tensor=4)
    assert found["tensor"] == 50e9  # four neighbours in a line
    # the other dimension's ring, and four interleaved rings that share the first's
    assert found["fsdp"] == 2 * 50e9 + 2 * 50e9 / 4


def test_slices_and_hosts_are_joined_by_the_network():
    found = rates("4*v5e:16x16", data=4, fsdp=256)
    assert found == {"data": 25e9 / 8, "fsdp": 200e9}  # 6.4 Tb/s a pod of 256
    assert rates("h100:64", fsdp=8, tensor=8) == {"tensor": 450e9, "fsdp": 50e9}
    assert rates("h100:64", fsdp=64) == {"fsdp": 8 * 50e9}  # by the cards of a host's eight GPUs
    with pytest.raises(ValueError, match="3 slices divide none of mesh.data"):
        rates("3*v5e:4x4", fsdp=16, tensor=3)


def test_the_config_says_which_axis_crosses_slices():
    by_default = rates("2*v5e:4x4", data=2, pipeline=2, fsdp=8)
    asked = rates("2*v5e:4x4", data=2, pipeline=2, fsdp=8, across_slices="pipeline")
    assert by_default["data"] == asked["pipeline"] == 25e9 / 8
    assert asked["data"] > 25e9 / 8 < by_default["pipeline"]


def test_switches_join_whole_cubes_only():
    """Slices of v5p below a 4x4x4 cube have no rings (docs.cloud.google.com/tpu/docs/v5p)."""
    assert rates("v5p:2x2x4", fsdp=16) == {"fsdp": 300e9}
    assert rates("v5p:4x4x8", fsdp=128) == {"fsdp": 600e9}


def test_slices_of_v5p_are_as_large_as_their_cubes_allow():
    assert parse_slice("v5p:4x4x28").num_chips == 448
    with pytest.raises(ValueError, match="largest slice of v5p is v5p:16x16x24"):
        parse_slice("v5p:16x16x28")


def test_a_mesh_of_other_chips_is_told():
    with pytest.raises(ValueError, match=r"mesh \(fsdp=8\) needs 8 devices but there are 16"):
        rates("v5e:4x4", fsdp=8)
