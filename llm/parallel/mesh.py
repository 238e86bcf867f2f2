"""The device mesh and multi-host start-up. Ground floor: every array's placement starts here."""

import re
import socket
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm.parallel.aborts import last_word, leave_now
from llm.parallel.config import MESH_AXES, MeshConfig

_USER_ERROR = 2  # the exit code of a mistake that a person can mend


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh over the devices (default: all), laid out so that inner axes are near.

    Devices of several slices are told by their `slice_index`: see MeshConfig.across_slices.

    Raises:
      ValueError: the config's sizes do not multiply to the number of devices, or no axis can cross
        the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices: dict[int, list] = {}
    for device in devices:
        slices.setdefault(_slice_of(device), []).append(device)
    crossing, sizes = config.within_slices(len(devices), len(slices))
    grids = [_arrange(slices[index], sizes) for index in sorted(slices)]
    grid = np.concatenate(grids, axis=MESH_AXES.index(crossing))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slice_of(device: Any) -> int:
    """Return the number of a device's slice: of a TPU pod, or of GPUs that NVLink joins."""
    if device.platform == "cpu":
        return 0
    return getattr(device, "slice_index", 0) or 0


def _arrange(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """Return the devices of one slice as a grid whose axes follow the links between them."""
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(sizes)  # fake devices have no links to respect
    try:
        return mesh_utils.create_device_mesh(sizes, devices=devices)
    except NotImplementedError:  # an axis must take a part of one of the torus's
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)


def start_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    *,
    timeout_seconds: int = 300,
) -> None:
    """Join the other processes of a run where there are any; a lone one goes on at once.

    `jax.distributed` finds them in the environment (Cloud TPU, SLURM, Open MPI, Kubernetes); what
    is given by hand overrides it. To be called before JAX's first computation. Where they do not
    come together in time, JAX aborts the process, which says why and exits with code 2.

    Raises:
      ValueError: what is given by hand is not enough, or wrong.
    """
    if jax.distributed.is_initialized():
        return
    if (coordinator_address, num_processes, process_index) != (None, None, None):
        _check_given(coordinator_address, num_processes, process_index)
        if process_index == 0:
            _check_port_is_free(coordinator_address)
    given = f"{num_processes} processes at {coordinator_address}" if num_processes else "the run"
    missed = (
        f"error: {given} did not come together within {timeout_seconds} s (this one is "
        f"{process_index}): each must be started, once, with its own index, and reach process 0"
    )
    try:
        with last_word(lambda: leave_now(missed, _USER_ERROR)):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_index,
                initialization_timeout=timeout_seconds,
            )
    except ValueError as error:
        # what it says when nothing in the environment names other hosts
        if coordinator_address is not None or "coordinator_address" not in str(error):
            raise


def _check_port_is_free(address: str) -> None:
    """Listen where JAX will, on every interface: JAX 0.10 reads a null pointer if it cannot."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"process 0 cannot listen at {address}: {error}") from error


def _check_given(address: str | None, num_processes: int | None, index: int | None) -> None:
    if address is None or num_processes is None or index is None:
        raise ValueError(
            "a run of several processes needs coordinator, num_processes and process_index; given "
            f"are {address}, {num_processes} and {index}"
        )
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"coordinator={address}: must be host:port")
    if not 0 <= index < num_processes:
        raise ValueError(f"process_index={index}: must be one of 0 to {num_processes - 1}")
