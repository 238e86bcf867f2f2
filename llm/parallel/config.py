"""Mesh sizes as a typed config, importable without JAX. Ground floor."""

import dataclasses
import math
from typing import Literal

MESH_AXES = ("data", "fsdp", "expert", "pipeline", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what the others leave.

    Batches are split over data, fsdp, expert and pipeline; parameters over fsdp, expert, pipeline
    and tensor; sequences over context. See llm/parallel/rules.py for the whole table.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    pipeline: int = 1
    context: int = 1
    tensor: int = 1
    # Of several TPU slices, or hosts of GPUs: the axis that crosses from one to the next, over the
    # data centre's network; all others stay on the links within. "auto": the first that can.
    across_slices: Literal["auto", "data", "pipeline", "fsdp"] = "auto"

    def within_slices(self, num_devices: int, num_slices: int) -> tuple[str, tuple[int, ...]]:
        """Return the axis that crosses slices, and the sizes within one, in MESH_AXES' order.

        Raises:
          ValueError: as `sizes`, or there are more slices than that axis can cross.
        """
        sizes = dict(zip(MESH_AXES, self.sizes(num_devices), strict=True))
        auto = self.across_slices == "auto"
        asked = ("data", "pipeline", "fsdp") if auto else (self.across_slices,)
        fitting = [axis for axis in asked if sizes[axis] % num_slices == 0]
        if not fitting:
            tried = ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in asked)
            raise ValueError(
                f"{num_slices} slices divide none of {tried}, one of which must cross them "
                f"(mesh.across_slices={self.across_slices!r})"
            )
        sizes[fitting[0]] //= num_slices
        return fitting[0], tuple(sizes.values())

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Return the size of each axis in MESH_AXES' order on that many devices.

        Raises:
          ValueError: the sizes cannot multiply to num_devices.
        """
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        others = [f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True) if s != 1]
        shown = ", ".join(others or ["data=1"])
        bad = [a for a, s in zip(MESH_AXES, sizes, strict=True) if s == 0 or s < -1]
        if bad:
            raise ValueError(f"mesh.{bad[0]}={getattr(self, bad[0])}: must be positive, or -1")
        if sizes.count(-1) > 1:
            raise ValueError(f"mesh ({shown}): only one axis may be -1")
        known = math.prod(s for s in sizes if s != -1)
        if -1 in sizes:
            if num_devices % known:
                raise ValueError(
                    f"mesh ({shown}): {num_devices} devices are not divisible by {known}; "
                    f"choose axes whose product divides {num_devices}"
                )
            sizes[sizes.index(-1)] = num_devices // known
        elif known != num_devices:
            raise ValueError(
                f"mesh ({shown}) needs {known} devices but there are {num_devices}; "
                "set one axis to -1 to take what is left"
            )
        return tuple(sizes)
