"""One run a workdir: a second is refused with the first one's name, a dead one blocks nobody."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from llm.training.lock import Lock, WorkdirInUseError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Takes the lock, forks a worker that outlives it, and waits to be killed.
HOLDER = """
import os, sys, time
from llm.training.lock import Lock
lock = Lock(sys.argv[1])
lock.acquire()
ready, tell = os.pipe()
worker = os.fork()
if worker == 0:
    os.write(tell, b"!")
    time.sleep(30)
    os._exit(0)
os.read(ready, 1)  # killed sooner, the worker would not have run what a fork runs first
print(worker, flush=True)
time.sleep(30)
"""


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    holder = f"process {os.getpid()} on host {socket.gethostname()}"
    with pytest.raises(WorkdirInUseError, match=f"{tmp_path} is in use by {holder}"):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_a_dead_process_does_not_block(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        text=True,
    )
    worker = int(child.stdout.readline())
    lock = Lock(tmp_path)
    with pytest.raises(WorkdirInUseError, match=f"process {child.pid} on host"):
        lock.acquire()
    child.kill()
    child.wait()
    try:
        lock.acquire()  # though the killed process' file and its worker are still there
        assert (tmp_path / "run.lock").exists()
        lock.release()
    finally:
        os.kill(worker, 9)


def test_a_half_written_lock_file_still_names_something(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    (tmp_path / "run.lock").write_text('{"pid": ')
    with pytest.raises(WorkdirInUseError, match="another process"):
        Lock(tmp_path).acquire()
    lock.release()
