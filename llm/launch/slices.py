"""TPU slices and GPU hosts by their short names, as SkyPilot calls them. Third floor.

From Google's pages on each TPU version. The number after v4 and v5p counts TensorCores, two a chip;
after v5e and v6e it counts chips, of which a host of one chip or four can be had, too.
"""

import re
from typing import NamedTuple


class Slice(NamedTuple):
    """What a task of SkyPilot asks for."""

    accelerators: str  # as SkyPilot's catalog calls it
    runtime_version: str | None  # software of TPU VMs; None: no TPU


class _Version(NamedTuple):
    accelerator: str
    runtime_version: str
    sizes: tuple[int, ...]  # as names count


_POWERS = tuple(2**k for k in range(3, 13))
_LITE = (1, 4, *_POWERS[:6])
_VERSIONS = {
    "v4": _Version("tpu-v4", "tpu-ubuntu2204-base", _POWERS),
    "v5e": _Version("tpu-v5litepod", "v2-alpha-tpuv5-lite", _LITE),
    "v5p": _Version("tpu-v5p", "v2-alpha-tpuv5", (*_POWERS[:4], *range(128, 12289, 128))),
    "v6e": _Version("tpu-v6e", "v2-alpha-tpuv6e", _LITE),
}
_GPUS = ("A100", "A100-80GB", "H100", "H200", "B200", "L4")


def find_slice(name: str) -> Slice:
    """Return the slice called `v5e-8`, `v5p-128` or `H100:8`.

    Raises:
      ValueError: there is none; names those there are.
    """
    if match := re.fullmatch(r"([\w-]+):(\d+)", name):
        if match[1] not in _GPUS or not 1 <= int(match[2]) <= 8:
            raise ValueError(f"slice {name}: GPUs are {', '.join(_GPUS)}, 1 to 8 of them a host")
        return Slice(name, None)
    kind, _, number = name.partition("-")
    version = _VERSIONS.get(kind)
    if version is None or not number.isdecimal() or int(number) not in version.sizes:
        known = "; ".join(
            f"{kind}-{each.sizes[0]} to {kind}-{each.sizes[-1]}" for kind, each in _VERSIONS.items()
        )
        raise ValueError(
            f"slice {name}: slices are {known}, by powers of two (v5p from 128 on by 128), or GPUs "
            "as H100:8"
        )
    return Slice(f"{version.accelerator}-{number}", version.runtime_version)
