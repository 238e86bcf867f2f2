"""Commands that go on where they stopped, and the record of their starts. Third floor.

What an executor needs to know of a member of a sweep, and all that it has to leave behind.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from etils import epath

from llm.parallel.aborts import LOST_PEER_EXIT_CODE
from llm.training.files import append_json_line, is_local, read_json_lines
from llm.training.manifests import CHECKPOINTS, CorruptStepError, list_steps, read_manifest
from llm.training.metrics import METRICS, decode_row
from llm.training.preemption import EXIT_CODE

STARTS = "starts.jsonl"  # in a job's folder: one line for each start that has ended
LOG = "launch.log"  # what its starts have printed
USER_ERROR = 2  # what no further start would mend (experiments/entry.py)

GO_ON = (EXIT_CODE, LOST_PEER_EXIT_CODE)  # all is saved: start again
_TAIL_BYTES, _TAIL_LINES = 65536, 12


class Job(NamedTuple):
    """A command that, started again, goes on where it stopped, as every entry point's does."""

    name: str
    command: tuple[str, ...]
    folder: epath.Path  # its workdir
    stop_at_step: int = 0  # how far it is to run; 0: to its end


class LaunchError(RuntimeError):
    """Where jobs were to run, they were refused."""


class Executor(Protocol):
    """Where jobs run: llm/launch/local.py, slurm.py, skypilot.py."""

    # By name, the jobs that have failed for good and whose starts are not recorded, and how.
    failed: Mapping[str, str]

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run jobs, those left out that are on their way; return whether all are over.

        False: they run elsewhere. The same call later says how they stand.
        """

    def describe(self, jobs: Sequence[Job]) -> str:
        """Return what `run` would hand over, as text to look at."""


def record_start(job: Job, exit_code: int, seconds: float) -> None:
    """Note how a start of the job has ended; a negative code is the signal that ended it."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"time": now, "exit_code": exit_code, "seconds": round(seconds, 1)}
    append_json_line(job.folder / STARTS, row | {"stop_at_step": job.stop_at_step})


def read_starts(folder: epath.Path) -> list[dict[str, Any]]:
    """Return how each start of the job in a folder has ended, the oldest first."""
    return read_json_lines(folder / STARTS)


def is_done(job: Job) -> bool:
    """Return whether the job has gone as far as it is to."""
    return has_reached(job.folder, job.stop_at_step)


def has_reached(folder: epath.Path, stop_at_step: int = 0) -> bool:
    """Return whether the run in a folder has gone up to a step, or, of 0, to its end: by its
    checkpoints, or, where there are none, because a start succeeded."""
    steps = list_steps(folder)
    if not steps:
        reached = (0, stop_at_step)
        starts = read_starts(folder)
        return any(row["exit_code"] == 0 and row["stop_at_step"] in reached for row in starts)
    try:
        manifest = read_manifest(folder / CHECKPOINTS / str(steps[-1]))
    except CorruptStepError:
        return False
    last = manifest["total_steps"]
    far = manifest["step"] >= min(stop_at_step or last, last)
    return far and (manifest["step"] > stop_at_step > 0 or manifest["body_done"])


def describe_exit(exit_code: int) -> str:
    """Return in words what a process's exit code says."""
    if exit_code < 0:
        return f"killed by signal {-exit_code}"
    known = {
        0: "done",
        1: "a bug (exit code 1)",
        USER_ERROR: "something to mend (exit code 2)",
        EXIT_CODE: "told to leave, saved (exit code 75)",
        LOST_PEER_EXIT_CODE: "another process of it is gone (exit code 76)",
    }
    return known.get(exit_code, f"exit code {exit_code}")


def tail(folder: epath.Path) -> str:
    """Return the last lines of what a job has printed; empty where nothing is kept here."""
    lines = _last_bytes(folder / LOG).decode(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def last_metrics(folder: epath.Path) -> dict[str, Any]:
    """Return the newest value of each of a job's metrics; {} where there is none yet."""
    newest: dict[str, Any] = {}
    for line in _last_bytes(folder / METRICS).split(b"\n"):
        with contextlib.suppress(ValueError):  # torn at either end
            newest |= decode_row(json.loads(line))
    return newest


def _last_bytes(path: epath.Path) -> bytes:
    if not is_local(path) or not path.exists():
        return b""
    with open(os.fspath(path), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read()
