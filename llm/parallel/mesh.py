"""The device mesh and multi-host start-up. Ground floor: every array's placement starts here."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed  # what it has found out has no public name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm.parallel.aborts import LOST_PEER_EXIT_CODE, last_word, leave_now
from llm.parallel.agreement import check_agreement
from llm.parallel.config import MESH_AXES, MeshConfig

_USER_ERROR = 2  # the exit code of a mistake that a person can mend
_TOLD_SECONDS = 20.0  # who waits longer for the others says so

_together = contextlib.ExitStack()  # what a process that others belong to does at its end

log = logging.getLogger(__name__)


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


class Process(NamedTuple):
    """One of the processes of a run: its number, how many there are, where number 0 listens."""

    index: int
    count: int
    coordinator: str  # host:port


ALONE = "alone"  # what says that a process is a run of its own, whatever its environment says


def parse_process(text: str) -> Process:
    """Return the process that `0/2@host:1234` names, process 0 of 2.

    Raises:
      ValueError: it names none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)@([^\s/@]+:(\d+))", text)
    if match is None:
        raise ValueError(f"process={text}: must be INDEX/COUNT@HOST:PORT of process 0, or {ALONE}")
    process = Process(int(match[1]), int(match[2]), match[3])
    if process.index >= process.count:
        raise ValueError(f"process={text}: INDEX counts from 0 and must be less than COUNT")
    if not 0 < int(match[4]) < 2**16:
        raise ValueError(f"process={text}: PORT must be one of 1 to 65535")
    return process


def start_distributed(process: str | None = None, *, timeout_seconds: int = 300) -> None:
    """Join the other processes of a run where there are any; a lone one goes on at once.

    `jax.distributed` finds them in the environment (Cloud TPU, GKE, SLURM, Open MPI, Kubernetes);
    a `process` as `parse_process` reads it overrides that. To be called before JAX's first
    computation. Where they do not come together in time, JAX aborts the process, which says so and
    exits with code 2.

    Raises:
      ValueError: the process cannot be read, its port cannot be listened at, or others were told
        another count.
    """
    if jax.distributed.is_initialized() or process == ALONE:
        return
    index, count, coordinator = (None,) * 3 if process is None else parse_process(process)
    if index == 0:
        _check_port_is_free(coordinator)
    began = time.monotonic()

    def missed():
        leave_now(
            f"error: {_who()} could not join the others in {time.monotonic() - began:.0f} s: each "
            "must be started, once, with its own INDEX and the same COUNT, and reach process 0",
            _USER_ERROR,
        )

    told = threading.Timer(_TOLD_SECONDS, lambda: log.warning("%s waits for the others", _who()))
    told.daemon = True
    told.start()
    try:
        with last_word(missed), _ended_by_ctrl_c():
            jax.distributed.initialize(
                coordinator, count, index, initialization_timeout=timeout_seconds
            )
    except ValueError as error:
        # what it says when nothing in the environment names other hosts
        if coordinator is not None or "coordinator_address" not in str(error):
            raise
    else:
        _together.enter_context(last_word(_lost))
        # JAX goes by what process 0 was told
        check_agreement("count", {"COUNT": distributed.global_state.num_processes})
    finally:
        told.cancel()


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Within the block Ctrl-C ends the process: Python would hear of it when C++ returns."""
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler  # and so in the main thread, where it can be set
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _lost() -> None:
    leave_now(
        f"{_who()} leaves (exit code {LOST_PEER_EXIT_CODE}): another of them is gone, or was "
        "started a second time; JAX's error above says which",
        LOST_PEER_EXIT_CODE,
    )


def _who() -> str:
    run = distributed.global_state
    return f"process {run.process_id} of {run.num_processes} at {run.coordinator_address}"


def _check_port_is_free(address: str) -> None:
    """Listen where JAX will, on every interface: JAX 0.10 reads a null pointer if it cannot."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno)  # without the address that it adds, which is not this one
        raise ValueError(
            f"process 0 cannot listen at {address}: {reason}; choose another PORT"
        ) from error
