"""What a person gets wrong when starting several processes by hand is one line at once."""

import re
import socket
import subprocess
import sys

import pytest
from jax._src import distributed

from llm.parallel.aborts import LOST_PEER_EXIT_CODE
from llm.parallel.mesh import start_distributed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0/2", "must be INDEX/COUNT@HOST:PORT"),
        ("0/2@localhost", "must be INDEX/COUNT@HOST:PORT"),
        ("localhost:1234", "must be INDEX/COUNT@HOST:PORT"),
        ("0/2@http://localhost:1234", "must be INDEX/COUNT@HOST:PORT"),
        ("2/2@localhost:1234", "INDEX counts from 0 and must be less than COUNT"),
        ("0/0@localhost:1234", "INDEX counts from 0 and must be less than COUNT"),
        ("1/2@localhost:0", "PORT must be one of 1 to 65535"),
        ("1/2@localhost:65536", "PORT must be one of 1 to 65535"),
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


START = """
import llm.parallel.mesh as mesh
mesh._TOLD_SECONDS = 0.1
mesh.start_distributed({process!r}, timeout_seconds={timeout})
{then}
"""


def start(process, timeout=60, then=""):
    code = START.format(process=process, timeout=timeout, then=then)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def finish(child):
    return child.communicate(timeout=120)[1].strip().splitlines()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_others_that_do_not_come_are_told_in_the_last_line():
    child = start(f"1/2@localhost:{free_port()}", timeout=1)
    said = finish(child)
    assert child.returncode == 2
    assert any(line.endswith("waits for the others") for line in said)
    assert re.match(r"error: process 1 of 2 at localhost:\d+ could not join the others", said[-1])


def test_a_port_in_use_is_named():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = finish(start(f"0/2@localhost:{port}"))[-1]
    assert said == (
        f"ValueError: process 0 cannot listen at localhost:{port}: Address already in use; "
        "choose another PORT"
    )


def test_a_difference_is_named_by_all():
    port = free_port()
    for child in [start(f"{process}@localhost:{port}") for process in ("0/2", "1/3")]:
        assert "process 1 and process 0 of one run differ in COUNT (3, 2)" in finish(child)[-1]


JOINED = "import sys, time; print('joined', file=sys.stderr, flush=True); time.sleep(120)"


def test_a_process_that_joins_a_second_time_ends_the_others_with_a_word():
    """JAX aborts them, while they read their data perhaps."""
    port = free_port()
    both = [start(f"{index}/2@localhost:{port}", then=JOINED) for index in (0, 1)]
    for child in both:
        while child.stderr.readline() not in ("joined\n", ""):
            pass
    again = start(f"1/2@localhost:{port}")
    for index, child in enumerate(both):
        last = finish(child)[-1]
        assert child.returncode == LOST_PEER_EXIT_CODE, last
        assert last.startswith(f"process {index} of 2 at localhost:{port} leaves (exit code 76)")
    again.kill()
    again.communicate()
