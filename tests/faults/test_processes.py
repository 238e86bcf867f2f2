"""Several processes of one run, really started, of which one is killed, stopped, hangs, or is told
to leave: the others name it and leave, and a restart goes on, with as many processes or with one.

Losses are compared to 1e-5 of themselves: each process sums its share of a batch, and float32 sums
depend on the order (seen: 3e-7 after 30 steps).
"""

import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from llm.training.loading import verify
from llm.training.manifests import list_steps, read_ledger
from llm.training.metrics import read_metrics
from llm.training.peers import LOST_PEER_EXIT_CODE
from tests.faults.harness import finish, make_life, start

TOTAL_STEPS = 40
FLAGS = (
    f"--config.total_steps={TOTAL_STEPS}",
    "--config.run.save_every_steps=5",
    "--config.run.keep_newest_checkpoints=99",
)
HANG_SECONDS = 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    make_life(folder, {"pretrain": FLAGS})  # unbroken, on one process
    return folder


def start_both(folder, workdir, *flags, patch=None):
    """Start process 0 and process 1, with a patch in the latter."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = (f"--coordinator=localhost:{port}", "--num_processes=2")
    return [
        start(
            "pretrain",
            folder,
            workdir,
            *FLAGS,
            *together,
            f"--process_index={index}",
            *flags,
            patch=patch if index else None,
        )
        for index in range(2)
    ]


def wait_for_step(workdir, step, processes):
    deadline = time.monotonic() + 200
    while not (rows := read_metrics(workdir)) or rows[-1]["step"] < step:
        assert all(process.poll() is None for process in processes), finish(processes[0])
        assert time.monotonic() < deadline, "no step is taken"
        time.sleep(0.01)


def finish_within(seconds, process, expect=0):
    """Wait for a process and return its last line."""
    said = ""
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == expect, said
    return said.strip().splitlines()[-1]


def test_told_to_leave_then_bereft_then_alone(folder):
    workdir = folder / "together"
    # One is told to leave by its scheduler, the other by Ctrl-C: both save the same step.
    both = start_both(folder, workdir)
    wait_for_step(workdir, 3, both)
    both[0].send_signal(signal.SIGINT)
    both[1].send_signal(signal.SIGTERM)
    said = [finish(process, expect=75) for process in both]
    step = list_steps(workdir)[-1]
    assert f"SIGINT: step {step} is saved" in said[0]
    assert read_metrics(workdir)[-1]["step"] == step < TOTAL_STEPS

    # Together again, until one is killed.
    both = start_both(folder, workdir)
    wait_for_step(workdir, step + 6, both)
    both[1].kill()
    last_line = finish_within(60, both[0], expect=LOST_PEER_EXIT_CODE)
    assert f"process 1 (host {socket.gethostname()}, pid {both[1].pid}) at step" in last_line
    assert "no sign of life" in last_line
    reached = read_metrics(workdir)[-1]["step"]
    assert list_steps(workdir)[-1] >= reached - 10

    # And the other goes on alone, to the end of the unbroken run.
    said = finish(start("pretrain", folder, workdir, *FLAGS))
    assert "resumed at step" in said and "corrupt" not in said
    ours, unbroken = read_ledger(workdir), read_ledger(folder / "pretrain")
    cursors = {row["step"]: row["cursor"] for row in ours}
    assert {row["step"]: row["cursor"] for row in unbroken}.items() <= cursors.items()
    assert len(ours) == len(cursors) == len(unbroken) + (step % 5 > 0)
    rows = [read_metrics(run) for run in (workdir, folder / "pretrain")]
    assert [row["step"] for row in rows[0]] == list(range(1, TOTAL_STEPS + 1))
    losses = [[row["train/loss"] for row in of_run] for of_run in rows]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # What two processes saved, this one reads to the bit.
    reports = verify(workdir)
    assert [report.step for report in reports] == sorted(cursors)
    assert all(report.problems == () for report in reports)


HANG_AT_THE_FOURTH_BATCH = """
import time, llm.data.loader as l
real, calls = l.Batches.__next__, []
def hang(self):
    calls.append(1)
    if len(calls) == 4: time.sleep(1000)
    return real(self)
l.Batches.__next__ = hang
"""


def test_whoever_dies_or_hangs_is_named(folder):
    workdir = folder / "faults"
    timeout = f"--config.run.hang_timeout_seconds={HANG_SECONDS}"
    # The one that coordinates is killed. JAX would abort the other without a name.
    both = start_both(folder, workdir, timeout)
    wait_for_step(workdir, 6, both)
    both[0].kill()
    last_line = finish_within(60, both[1], expect=LOST_PEER_EXIT_CODE)
    assert (
        f"process 0 (host {socket.gethostname()}, pid {both[0].pid}), which coordinates"
        in last_line
    )

    # One is stopped: neither it nor its heartbeat goes on, and no connection breaks.
    both = start_both(folder, workdir, timeout)
    wait_for_step(workdir, read_metrics(workdir)[-1]["step"] + 2, both)
    os.kill(both[1].pid, signal.SIGSTOP)
    last_line = finish_within(HANG_SECONDS + 30, both[0], expect=LOST_PEER_EXIT_CODE)
    assert f"pid {both[1].pid}) at step" in last_line and "no sign of life" in last_line
    both[1].kill()

    # One waits for data for ever, and its heartbeat goes on.
    both = start_both(folder, workdir, timeout, patch=HANG_AT_THE_FOURTH_BATCH)
    for process in both:
        last_line = finish_within(200, process, expect=LOST_PEER_EXIT_CODE)
        culprit, _, others = last_line.partition("no progress")
        assert f"process 1 (host {socket.gethostname()}, pid {both[1].pid}) at step" in culprit
        assert "`batch = next(batches)`" in culprit
        assert f"while others wait: process 0 (host {socket.gethostname()}" in others
