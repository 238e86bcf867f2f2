"""Names of slices, as Google's pages on TPU v4, v5e, v5p and v6e list them."""

import pytest

from llm.launch.slices import find_slice


@pytest.mark.parametrize(
    ("name", "accelerators"),
    [
        ("v4-8", "tpu-v4-8"),
        ("v4-32", "tpu-v4-32"),
        ("v5e-1", "tpu-v5litepod-1"),
        ("v5e-4", "tpu-v5litepod-4"),
        ("v5e-8", "tpu-v5litepod-8"),
        ("v5e-16", "tpu-v5litepod-16"),
        ("v5e-256", "tpu-v5litepod-256"),
        ("v5p-8", "tpu-v5p-8"),
        ("v5p-128", "tpu-v5p-128"),
        ("v5p-384", "tpu-v5p-384"),
        ("v5p-12288", "tpu-v5p-12288"),
        ("v6e-8", "tpu-v6e-8"),
        ("v6e-256", "tpu-v6e-256"),
        ("H100:8", "H100:8"),
    ],
)
def test_published_slices(name, accelerators):
    assert find_slice(name).accelerators == accelerators


@pytest.mark.parametrize(
    "name",
    [
        "v5e-12",
        "v5e-512",
        "v5e-2",
        "v5p-4",
        "v5p-96",
        "v5p-12416",
        "v9-8",
        "v5p",
        "H100:16",
        "H100",
        "v5e-x",
    ],
)
def test_other_names_are_one_line(name):
    with pytest.raises(ValueError, match=f"slice {name}: "):
        find_slice(name)
