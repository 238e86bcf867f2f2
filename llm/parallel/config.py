"""Mesh sizes as a typed config, importable without JAX. Ground floor."""

import dataclasses
import math

MESH_AXES = ("data", "fsdp", "expert", "pipeline", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what the others leave.

    Batches are split over data, fsdp and expert; parameters over fsdp, expert, pipeline and tensor;
    sequences over context.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    pipeline: int = 1
    context: int = 1
    tensor: int = 1

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
