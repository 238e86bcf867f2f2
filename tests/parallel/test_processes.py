"""What a person gets wrong when starting several processes by hand is one line at once."""

import os
import subprocess
import sys

import pytest

from llm.parallel.mesh import start_distributed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("localhost:1234", None, 0), "needs coordinator, num_processes and process_index"),
        ((None, 2, 0), "needs coordinator, num_processes and process_index"),
        (("localhost", 2, 0), "coordinator=localhost: must be host:port"),
        (("localhost:1234", 2, 2), "process_index=2: must be one of 0 to 1"),
    ],
)
def test_what_is_given_must_be_enough(given, said):
    with pytest.raises(ValueError, match=said):
        start_distributed(*given)


ALONE = """
from llm.parallel.mesh import start_distributed
start_distributed("localhost:{port}", 2, {index}, timeout_seconds=1)
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
