"""The flags of every experiment that trains, beside --workdir: --profile, --process."""

import dataclasses
import sys
from typing import Any

import jax
from absl import flags

from experiments import entry
from experiments.workdir_flag import WORKDIR
from llm.parallel.agreement import check_agreement
from llm.parallel.mesh import start_distributed
from llm.training.identity import code_of
from llm.training.run_config import flatten

PROFILE = entry.define_profile()
_PROCESS = flags.DEFINE_string(
    "process",
    None,
    "Which process of a run this is: INDEX/COUNT@HOST:PORT, where process 0 listens; or `alone`. "
    "Without it Cloud TPU, GKE, SLURM, Open MPI and Kubernetes are asked.",
)


def start_processes(config: Any, *, only_one: bool = False) -> None:
    """Read the sources that a run is made of, and join its other processes, if there are any.

    Now, because a job of hours must not take for its own what is edited meanwhile.

    Raises:
      ValueError: there are others and the experiment is for one, or they were started with other
        flags or code.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    code = {} if file is None else code_of(file)  # there is none of what is typed in
    start_distributed(_PROCESS.value)
    if only_one and jax.process_count() > 1:
        raise ValueError(
            f"this experiment measures and writes its tables in one process, and there are "
            f"{jax.process_count()}; run it on one host"
        )
    digests = {name: digest for name, (digest, _) in code.items()}
    fields = flatten(dataclasses.asdict(config), "config")
    check_agreement("flags", {"workdir": WORKDIR.value, **fields, **digests})
