"""A step predicted before anything is compiled or paid for: does it fit, how long, bound by what?
Third floor. Pure functions of a workload, a mesh and a slice."""

import dataclasses

from llm.parallel.config import MeshConfig
from llm.scaling.hardware import Slice, wire_axes
from llm.scaling.step_memory import StepMemory, count_step_memory
from llm.scaling.traffic import (
    count_layer_memory_traffic,
    count_traffic,
    count_update_memory_traffic,
)
from llm.scaling.work import Work, count_work
from llm.scaling.workload import Workload, mesh_sizes


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on, each at its published rate."""

    compute: float  # products and kernels of the layers and the loss
    idle: float  # of those, what a pipeline's stages compute without having work
    memory: float  # what those products read and write
    update: float  # the optimizer: its memory traffic or its products
    network: dict[str, float]  # by mesh axis
    crossing: str | None  # the axis between slices, through the data centre's network

    @property
    def bound(self) -> float:
        """The least a step can take: all of it at once, but for the update, which comes after."""
        busiest = max(self.compute, self.memory, max(self.network.values(), default=0.0))
        return busiest + self.update

    @property
    def predicted(self) -> float:
        """What a step is taken to take: parameters are gathered, and gradients reduced, beside the
        products; sums and exchanges of activations, and what runs between slices, are waited for.
        """
        of_params = {"fsdp", "data"} - {self.crossing}
        beside = sum(self.network.get(axis, 0.0) for axis in of_params)
        waited = sum(self.network.values()) - beside
        return max(self.compute, self.memory, beside) + waited + self.update

    @property
    def bound_by(self) -> str:
        """What the least time is made of: compute, memory, or network over which axis."""
        rivals = {"compute": self.compute, "memory": self.memory}
        rivals |= {f"network ({axis})": seconds for axis, seconds in self.network.items()}
        return max(rivals, key=rivals.__getitem__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs, and what that takes, on a slice."""

    memory: StepMemory
    memory_bytes: float  # that a chip has
    work: Work
    sent_bytes: dict[str, float]  # by mesh axis, of a device
    time: StepTime
    tokens: int
    peak_flops: float  # of all chips together

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory_bytes

    @property
    def mfu_bound(self) -> float:
        """The model's FLOPs in the least time, over the peak."""
        return self.work.model / self.time.bound / self.peak_flops

    @property
    def mfu(self) -> float:
        return self.work.model / self.time.predicted / self.peak_flops

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.time.predicted * 86400


def make_plan(workload: Workload, mesh: MeshConfig, where: Slice) -> Plan:
    """Return the plan of a step on a slice.

    Raises:
      ValueError: the mesh does not fit the slice, the model, or the batch.
    """
    wiring, sizes = wire_axes(where, mesh), mesh_sizes(mesh, where.num_chips)
    workload.check(sizes)
    chip, chips = where.chip, where.num_chips
    platform = "tpu" if chip.dimensions else "gpu"
    work = count_work(workload, sizes, platform)
    sent = count_traffic(workload, sizes, platform)
    compute = (work.products + work.attention) / chips / chip.peak_flops
    rate = chip.memory_bytes_per_second
    update = max(
        count_update_memory_traffic(workload, sizes) / rate,
        work.optimizer / chips / chip.peak_flops,
    )
    network = {axis: num_bytes / wiring[axis].bytes_per_second for axis, num_bytes in sent.items()}
    return Plan(
        memory=count_step_memory(workload, sizes),
        memory_bytes=chip.memory_bytes,
        work=work,
        sent_bytes=sent,
        time=StepTime(
            compute=compute,
            idle=compute * (1 - 1 / workload.turns(sizes)),
            memory=count_layer_memory_traffic(workload, sizes) / rate,
            update=update,
            network=network,
            crossing=next((a for a, lies in wiring.items() if lies.between_slices), None),
        ),
        tokens=workload.tokens,
        peak_flops=chips * chip.peak_flops,
    )
