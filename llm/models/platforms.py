"""What a program is compiled for, which may be a machine that is not here. Models floor."""

import jax


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": of the mesh in force, which may be of devices not here."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def need_platform(kernel: str, wanted: str) -> None:
    """Raise a ValueError where what is compiled is not for the platform that a kernel is for."""
    if platform() != wanted:
        raise ValueError(
            f"attention_kernel={kernel!r} is for {wanted.upper()}s, and this is a "
            f"{platform().upper()}; use 'auto'"
        )
