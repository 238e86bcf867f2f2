"""The flags of every experiment that trains: --workdir, --profile, and of several processes."""

import sys

import jax
from absl import flags

from experiments import entry
from llm.parallel.mesh import start_distributed
from llm.training.identity import code_of

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
PROFILE = entry.define_profile()
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, for a run of several processes that were started by hand; Cloud TPU, "
    "SLURM, Open MPI and Kubernetes say it themselves.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are, with --coordinator.", lower_bound=1
)
_PROCESS_INDEX = flags.DEFINE_integer(
    "process_index", None, "Which of them this is, from 0 on.", lower_bound=0
)


def start_processes(*, only_one: bool = False) -> None:
    """Read the sources that a run is made of, and join its other processes, if there are any.

    Now, because a job of hours must not take for its own what is edited meanwhile.

    Raises:
      ValueError: there are others and the experiment is for one.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is not None:  # there is none of what is typed in
        code_of(file)
    start_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_INDEX.value)
    if only_one and jax.process_count() > 1:
        raise ValueError(
            f"this experiment measures and writes its tables in one process, and there are "
            f"{jax.process_count()}; run it on one host"
        )
