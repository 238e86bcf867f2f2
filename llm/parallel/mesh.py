"""The device mesh and multi-host start-up. Ground floor: every array's placement starts here."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm.parallel.config import MESH_AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over the devices (default: all), laid out so that inner axes are near.

    Raises:
      ValueError: the config's sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)  # fake devices have no topology to respect
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices=devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def start_distributed(coordinator_address: str | None = None, **kwargs) -> None:
    """Join the other hosts of a run where there are any; a lone host goes on at once.

    `jax.distributed` finds them in the environment (Cloud TPU, SLURM, Open MPI, Kubernetes); an
    address given by hand overrides it. To be called before JAX's first computation.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator_address, **kwargs)
    except ValueError as error:
        # what it says when nothing in the environment names other hosts
        if coordinator_address is not None or "coordinator_address" not in str(error):
            raise
