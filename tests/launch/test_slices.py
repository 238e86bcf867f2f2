"""Chips and hosts of slices, as Google's pages on TPU v4, v5e, v5p and v6e list them."""

import pytest

from llm.launch.slices import find_slice


@pytest.mark.parametrize(
    ("name", "accelerators", "chips", "hosts"),
    [
        ("v4-8", "tpu-v4-8", 4, 1),
        ("v4-32", "tpu-v4-32", 16, 4),
        ("v5e-8", "tpu-v5litepod-8", 8, 1),
        ("v5e-16", "tpu-v5litepod-16", 16, 4),
        ("v5e-256", "tpu-v5litepod-256", 256, 64),
        ("v5p-8", "tpu-v5p-8", 4, 1),
        ("v5p-128", "tpu-v5p-128", 64, 16),
        ("v5p-12288", "tpu-v5p-12288", 6144, 1536),
        ("v6e-8", "tpu-v6e-8", 8, 1),
        ("v6e-256", "tpu-v6e-256", 256, 64),
        ("H100:8", "H100:8", 8, 1),
    ],
)
def test_published_slices(name, accelerators, chips, hosts):
    found = find_slice(name)
    assert (found.accelerators, found.num_chips, found.num_hosts) == (accelerators, chips, hosts)


@pytest.mark.parametrize("name", ["v5e-12", "v5e-512", "v9-8", "v5p", "H100:16", "H100", "v5e-x"])
def test_other_names_are_one_line(name):
    with pytest.raises(ValueError, match=f"slice {name}: "):
        find_slice(name)
