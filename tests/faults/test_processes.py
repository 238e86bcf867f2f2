"""Several processes of one run, really started, of which one is killed, stopped, hangs, or is told
to leave: the others name it and leave, and a restart goes on, with as many processes or with one.

Losses are compared to 1e-5 of themselves: each process sums its share of a batch, and float32 sums
depend on the order (seen: 3e-7 after 30 steps).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from llm.parallel.aborts import LOST_PEER_EXIT_CODE
from llm.training.loading import load_params, verify
from llm.training.manifests import LEDGER, CorruptStepError, list_steps, read_ledger
from llm.training.metrics import METRICS, read_metrics
from tests.faults import shared_store
from tests.faults.harness import finish, make_life, start, start_together

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


def start_both(folder, workdir, *flags, patches=(None, None)):
    return start_together("pretrain", folder, workdir, *FLAGS, *flags, patches=patches)


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


def assert_ends_as_unbroken(folder, workdir, *also_saved):
    ours, unbroken = read_ledger(workdir), read_ledger(folder / "pretrain")
    cursors = {row["step"]: row["cursor"] for row in ours}
    assert {row["step"]: row["cursor"] for row in unbroken}.items() <= cursors.items()
    assert sorted(cursors) == sorted({row["step"] for row in unbroken} | set(also_saved))
    assert len(ours) == len(cursors)
    rows = [read_metrics(run) for run in (workdir, folder / "pretrain")]
    assert [row["step"] for row in rows[0]] == list(range(1, TOTAL_STEPS + 1))
    losses = [[row["train/loss"] for row in of_run] for of_run in rows]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # What others saved, this one reads to the bit.
    reports = verify(workdir)
    assert [report.step for report in reports] == sorted(cursors)
    assert all(report.problems == () for report in reports)


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
    assert_ends_as_unbroken(folder, workdir, step)


@pytest.mark.long
def test_on_an_object_store_one_then_two_then_one(folder, tmp_path):
    shared_store.register(str(tmp_path))
    child = shared_store.IN_A_CHILD.format(root=str(tmp_path))
    workdir, objects = "shared://bucket/run", tmp_path / "objects/bucket/run"
    copy_as_of_step(10, folder / "pretrain", objects)

    # Two go on from what one has saved on a file system, until one of them is killed. The other's
    # lock stays, which nobody renews.
    both = start_both(folder, workdir, "--config.mesh.fsdp=2", patches=(child, child))
    wait_for_step(workdir, 20, both)
    both[1].kill()
    finish_within(60, both[0], expect=LOST_PEER_EXIT_CODE)
    together = list_steps(workdir)
    assert together[:3] == [5, 10, 15] and (objects / "run.lock").exists()

    # One goes on from what both have saved, to the end of the unbroken run.
    said = finish(start("pretrain", folder, workdir, *FLAGS, patch=child))
    assert f"resumed at step {together[-1]} " in said and "corrupt" not in said
    assert_ends_as_unbroken(folder, workdir)
    assert not (objects / "run.lock").exists()

    # A bit that flips in what process 1 has put is found.
    chunk = objects / "checkpoints/15/params.head.kernel/1.0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    problems = {report.step: report.problems for report in verify(workdir) if report.problems}
    assert list(problems) == [15] and "head.kernel/1.0 has other bytes" in problems[15][0]
    with pytest.raises(CorruptStepError, match="head.kernel/1.0"):
        load_params(workdir, 15)
    assert load_params(workdir, 20).step == 20


def copy_as_of_step(step, workdir, copy):
    """Copy a run as it was when it had saved a step."""
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("run.lock"))
    for later in list_steps(workdir):
        if later > step:
            shutil.rmtree(copy / f"checkpoints/{later}")
    for log in (LEDGER, METRICS):
        lines = (workdir / log).read_text().splitlines(keepends=True)
        (copy / log).write_text("".join(x for x in lines if json.loads(x)["step"] <= step))


HANG_AT_THE_FOURTH_BATCH = """
import time, llm.data.loader as l
real, calls = l.Batches.__next__, []
def hang(self):
    calls.append(1)
    if len(calls) == 4: time.sleep(1000)
    return real(self)
l.Batches.__next__ = hang
"""


@pytest.mark.long
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
    both = start_both(folder, workdir, timeout, patches=(None, HANG_AT_THE_FOURTH_BATCH))
    for process in both:
        last_line = finish_within(200, process, expect=LOST_PEER_EXIT_CODE)
        culprit, _, others = last_line.partition("no progress")
        assert f"process 1 (host {socket.gethostname()}, pid {both[1].pid}) at step" in culprit
        assert "`batch = next(batches)`" in culprit
        assert f"while others wait: process 0 (host {socket.gethostname()}" in others
