"""What a person gets wrong when starting several processes by hand is one line at once."""

import os
import subprocess
import sys

import pytest
from jax._src import distributed

from llm.parallel.mesh import start_distributed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0/2", "must be INDEX/COUNT@HOST:PORT"),
        ("0/2@localhost", "must be INDEX/COUNT@HOST:PORT"),
        ("localhost:1234", "must be INDEX/COUNT@HOST:PORT"),
        ("2/2@localhost:1234", "INDEX must be one of 0 to 1"),
    ],
)
def test_what_is_given_must_be_a_process(text, said):
    with pytest.raises(ValueError, match=f"process={text}: {said}"):
        start_distributed(text)


# As SLURM sets them for a step; as GKE does for the second host of the second slice of a JobSet; as
# Open MPI's mpirun does. What JAX then joins: address, its own number.
STEP = {"JOB_ID": "4097", "STEP_NODELIST": "node[03-04],big7", "NTASKS": "3", "PROCID": "2"}
SLURM = {f"SLURM_{name}": value for name, value in (STEP | {"LOCALID": "0"}).items()}
GKE = {
    "TPU_WORKER_HOSTNAMES": "localhost,other",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize(
    ("environment", "address", "index"),
    [
        (SLURM, "node03:61441", 2),  # the port: the job's number modulo 4096, from 61440 on
        (GKE, "localhost:8482", 3),
        (OPEN_MPI, "10.96.0.1:62624", 3),  # 1531576320 / 4096 modulo 4096 is 1184
    ],
)
def test_the_environment_is_asked_and_the_flag_overrides_it(
    monkeypatch, environment, address, index
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed, "global_state", distributed.State())
    joined = []

    def join(address, index, **_):
        joined.append((address, index))
        raise ConnectionError("far enough")

    monkeypatch.setattr("jax._src.lib._jax.get_distributed_runtime_client", join)
    for given, expected in ((None, (address, index)), ("1/2@other:1234", ("other:1234", 1))):
        with pytest.raises(ConnectionError):
            start_distributed(given)
        assert joined.pop() == expected
    start_distributed("alone")
    assert joined == []


ALONE = """
from llm.parallel.mesh import start_distributed
start_distributed("{index}/2@localhost:{port}", timeout_seconds=1)
"""


def start_alone(port, index):
    code = ALONE.format(port=port, index=index)
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120
    )


def test_others_that_do_not_come_are_told_in_the_last_line():
    from socket import socket

    with socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    done = start_alone(port, 1)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith(f"error: 2 processes at localhost:{port} did not come together within 1")


def test_a_port_in_use_is_named():
    from socket import AF_INET6, socket

    with socket(AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = start_alone(port, 0)
    assert f"ValueError: process 0 cannot listen at localhost:{port}" in done.stderr
