"""Where the runs of a sweep are executed, and when hopeless ones end. Third floor, without JAX."""

import dataclasses

from llm.parallel.checks import check_ranges, shown


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Processes on this machine (llm/launch/local.py)."""

    parallel: int = 1  # members at a time
    pin_cores: bool = True  # each member keeps to its own share of the cores
    # CUDA_VISIBLE_DEVICES of each member at a time: ("0,1", "2,3"). Empty: all see all.
    cuda_devices: tuple[str, ...] = ()
    retries: int = 2  # of a member that failed, its own mistakes left out

    def __post_init__(self):
        check_ranges(self, section="local.", size="parallel", count="retries")
        if self.cuda_devices and len(self.cuda_devices) != self.parallel:
            raise ValueError(
                f"local.cuda_devices={shown(self.cuda_devices)}: give one for each of "
                f"local.parallel={self.parallel}"
            )


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """An array job (llm/launch/slurm.py). What is empty or None is left to the cluster."""

    parallel: int | None = None  # members at a time
    partition: str = ""
    account: str = ""
    time_limit: str = ""  # of one start, as sbatch reads it: "12:00:00"
    nodes: int = 1  # of a member
    gpus_per_node: int = 0
    # Processes on a node. `jax.distributed` gives each of a SLURM step one device.
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    signal_seconds: int = 120  # before the limit, to save in
    retries: int = 20  # new starts of a member, those after a time limit among them
    directives: tuple[str, ...] = ()  # further ones: "--constraint=h100"
    setup: str = ""  # shell commands before a member: "module load cuda"

    def __post_init__(self):
        check_ranges(
            self,
            section="slurm.",
            size="parallel nodes tasks_per_node cpus_per_task signal_seconds",
            count="gpus_per_node retries",
        )
        if self.gpus_per_node > 1 and self.tasks_per_node != self.gpus_per_node:
            raise ValueError(
                f"slurm.tasks_per_node={self.tasks_per_node}: jax.distributed gives each process "
                f"of a SLURM step one GPU, so set it to gpus_per_node={self.gpus_per_node}"
            )


@dataclasses.dataclass(frozen=True)
class SkyPilotConfig:
    """Managed jobs of SkyPilot (llm/launch/skypilot.py): recovered when a spot slice is taken."""

    slice: str = "v5e-8"  # of llm/launch/slices.py: v5e-8, v5p-128, v6e-256, …, or H100:8
    nodes: int = 1  # of GPUs; a TPU slice is one, whatever its hosts
    infra: str = ""  # cloud, region, zone: "gcp/us-east5/us-east5-a"; empty: SkyPilot chooses
    use_spot: bool = True
    members_per_task: int = 1  # run one after the other on one slice
    retries: int = 3  # of a failed task; preemptions do not count
    disk_gigabytes: int = 200
    extras: tuple[str, ...] = ()  # of pyproject.toml, besides those of devices and bucket
    runtime_version: str = ""  # of TPU VMs; empty: that of the table of slices
    env: dict[str, str] = dataclasses.field(default_factory=dict)  # kept in sweep.json, as all is
    # Environment variables of this machine that tasks are given; only their names are kept.
    secrets: tuple[str, ...] = ()

    def __post_init__(self):
        check_ranges(
            self, section="skypilot.", size="nodes members_per_task disk_gigabytes", count="retries"
        )


@dataclasses.dataclass(frozen=True)
class HalvingConfig:
    """Successive halving (llm/launch/halving.py): at each rung all but the best end."""

    at_steps: tuple[int, ...] = ()
    factor: int = 3  # of n members that reach a rung, n/factor go on

    def __post_init__(self):
        check_ranges(self, section="halving.", size="at_steps", within={"factor": "[2, 1000]"})
        if not self.at_steps or list(self.at_steps) != sorted(set(self.at_steps)):
            raise ValueError(
                f"halving.at_steps={shown(self.at_steps)}: give at least one, each later than the "
                "one before"
            )


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """What is known of the machine that a member runs on. None: nothing is told of it."""

    flops_per_second: float | None = None  # sustained in training, of all its devices together
    price_per_hour: float | None = None  # of all its devices together
    currency: str = "USD"

    def __post_init__(self):
        check_ranges(self, section="cost.", positive="flops_per_second price_per_hour")
