"""A disk that fills up, or a directory that becomes read-only, during a run: the last checkpoint
stays, and training goes on if asked."""

import contextlib
import subprocess
import time

import pytest

from llm.training.loading import verify
from llm.training.manifests import list_steps
from llm.training.metrics import read_metrics
from tests.faults.harness import finish, make_life, outcome, start, wait_until

STEPS = ("--config.total_steps=120", "--config.run.save_every_steps=8")
GO_ON = "--config.run.go_on_after_failed_save=True"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes; only root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)])
    if made.returncode:
        pytest.skip("no right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    make_life(folder, {"pretrain": (*STEPS, GO_ON)})
    return folder


@contextlib.contextmanager
def full(disk, workdir):
    """Take all the room there is."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    yield "No space left on device"
    (disk / "filler").unlink()


@contextlib.contextmanager
def read_only(disk, workdir):
    """Let nothing be made or removed among the checkpoints, not even by root."""
    if subprocess.run(["chattr", "+i", str(workdir / "checkpoints")]).returncode:
        pytest.skip("this file system has no immutable directories")
    yield "Operation not permitted"
    subprocess.run(["chattr", "-i", str(workdir / "checkpoints")], check=True)


def test_without_being_asked_to_go_on_it_ends_loudly(small_disk, folder):
    workdir = small_disk / "run"
    child = start("pretrain", folder, workdir, *STEPS)
    wait_until(lambda: len(list_steps(workdir)) > 1, child)
    with full(small_disk, workdir) as reason:
        said = " ".join(finish(child, expect=2).split())
    assert reason in said
    newest = verify(workdir)[-1]
    assert newest.problems == ()
    # With room again it goes on, and ends where the unbroken run does.
    finish(start("pretrain", folder, workdir, *STEPS))
    assert digests(workdir)[120] == digests(folder / "pretrain")[120]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [full, pytest.param(read_only, marks=pytest.mark.long)])
def test_asked_to_go_on_it_trains_and_saves_when_it_can_again(small_disk, folder, fault):
    workdir = small_disk / "run"
    child = start("pretrain", folder, workdir, *STEPS, GO_ON)
    wait_until(lambda: len(list_steps(workdir)) > 1, child)
    with fault(small_disk, workdir) as reason:
        last = list_steps(workdir)[-1]
        time.sleep(1.0)
    said = " ".join(finish(child).split())
    assert "NOT SAVED" in said and reason in said
    assert said.count("its lines wait for room") == (fault is full)  # not once a line
    assert list_steps(workdir)[-1] == 120
    ours, unbroken = digests(workdir), digests(folder / "pretrain")
    assert last in ours and len(ours) < len(unbroken)
    assert ours.items() <= unbroken.items()
    # Not a line of the metrics is missing: they waited in memory.
    without_speed = [
        [{k: x for k, x in row.items() if not k.startswith("perf/")} for row in read_metrics(run)]
        for run in (workdir, folder / "pretrain")
    ]
    assert without_speed[0] == without_speed[1]


def digests(workdir):
    return {row["step"]: row["state_digest"] for row in outcome(workdir)[".: ledger"]}
