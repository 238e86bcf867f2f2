"""Published peak rates of chips. Third floor: the denominator of MFU."""

from collections.abc import Sequence

import jax

# Dense bf16 FLOPs a second of one device as JAX counts devices; from the makers' data sheets.
_PEAK_BF16_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Return the bf16 FLOPs a second of all devices together; None for a kind not in the table."""
    kind = devices[0].device_kind
    for name in sorted(_PEAK_BF16_FLOPS, key=len, reverse=True):  # "TPU v5 lite" before "TPU v5"
        if name in kind:
            return _PEAK_BF16_FLOPS[name] * len(devices)
    return None
