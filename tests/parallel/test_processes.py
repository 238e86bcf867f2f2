"""What a person gets wrong when starting several processes by hand is one line at once."""

import os
import subprocess
import sys

import pytest

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


def test_the_flag_overrides_what_the_environment_says(monkeypatch):
    """A SLURM step's variables, as its documentation has them; what JAX is given is looked at."""
    step = {"JOB_ID": "4097", "STEP_NODELIST": "node[03-04],big7", "NTASKS": "3", "PROCID": "2"}
    for name, value in (step | {"LOCALID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    joined = []
    monkeypatch.setattr(
        "jax._src.lib._jax.get_distributed_runtime_client",
        lambda address, index, **_: joined.append((address, index)) or pytest.fail("stop"),
    )

    def told(*given):
        with pytest.raises(pytest.fail.Exception, match="stop"):
            start_distributed(*given)
        return joined.pop()

    # the port is JAX's: the job's number modulo 4096, from 61440 on
    assert told() == ("node03:61441", 2)
    assert told("1/2@other:1234") == ("other:1234", 1)
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
