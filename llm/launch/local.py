"""Jobs as processes of this machine: some at a time, each on cores and GPUs of its own.

Ctrl-C or SIGTERM tells all to save and leave; a second one ends them at once.
"""

import collections
import contextlib
import os
import shlex
import signal
import subprocess
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from llm.launch.config import LocalConfig
from llm.launch.jobs import LOG, USER_ERROR, Job, describe_exit, is_done, record_start
from llm.launch.live import LiveTable
from llm.training.preemption import EXIT_CODE

_POLL_SECONDS = 0.1
_KILLED = 130  # the exit code of what a second Ctrl-C has ended


class Slot(NamedTuple):
    """What one job at a time has to itself."""

    cores: tuple[int, ...]  # empty: all
    cuda_devices: str | None  # None: as they are

    def env(self) -> dict[str, str]:
        """Return the environment of a process in the slot; XLA counts the cores itself."""
        env = dict(os.environ)
        if self.cores:
            env["OMP_NUM_THREADS"] = str(len(self.cores))
        if self.cuda_devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.cuda_devices
        return env


class _Running(NamedTuple):
    job: Job
    start: int  # which of this call, from 1 on
    slot: Slot
    child: subprocess.Popen
    since: float


class LocalExecutor:
    """See LocalConfig. The table shows `metric` and goes to `stream`, standard error by default.

    Raises:
      ValueError: there are fewer cores than jobs at a time.
    """

    failed: Mapping[str, str] = types.MappingProxyType({})  # starts are recorded

    def __init__(self, config: LocalConfig, *, metric: str = "", stream=None):
        self._config, self._slots = config, make_slots(config)
        self._metric, self._stream = metric, stream

    def describe(self, jobs: Sequence[Job]) -> str:
        """Return how many jobs run at a time, and the command of the first."""
        return f"{self._config.parallel} at a time, the first:\n{shlex.join(jobs[0].command)}"

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run the jobs that are not done, failed ones again; return True.

        Raises:
          SystemExit: told to leave; 75 where every job has saved, 130 where some were killed.
        """
        waiting = collections.deque((job, 1) for job in jobs if not is_done(job))
        free, running, told = list(self._slots), [], 0
        with (
            _watch_signals() as asked,
            LiveTable([job for job, _ in waiting], self._metric, self._stream) as table,
            _told_to_leave_on_error(running),
        ):
            while running or (waiting and not asked):
                while waiting and free and not asked:
                    job, start = waiting.popleft()
                    running.append(_start(job, start, free.pop(0)))
                    table.set(job.name, "runs" if start == 1 else f"runs (start {start})")
                time.sleep(_POLL_SECONDS)
                if len(asked) > told:
                    told = len(asked)
                    _pass_on(running, told, table)
                for each in [each for each in running if each.child.poll() is not None]:
                    running.remove(each)
                    free.append(each.slot)
                    if self._ended(each, table, leaving=bool(asked)):
                        waiting.append((each.job, each.start + 1))
                table.refresh()
        if asked:
            raise SystemExit(EXIT_CODE if len(asked) == 1 else _KILLED)
        return True

    def _ended(self, each: _Running, table: LiveTable, *, leaving: bool) -> bool:
        """Note how a start has ended; return whether there is to be another one."""
        code, seconds = each.child.returncode, time.monotonic() - each.since
        record_start(each.job, code, seconds)
        again = code not in (0, USER_ERROR) and each.start <= self._config.retries and not leaving
        more = ", starts again" if again else ""
        table.set(each.job.name, f"{describe_exit(code)} after {seconds:.0f} s{more}")
        return again


def make_slots(config: LocalConfig) -> list[Slot]:
    """Return what the jobs that run at a time have each: an equal share of this process's cores.

    Raises:
      ValueError: there are fewer cores than jobs at a time.
    """
    shares: list[tuple[int, ...]] = [()] * config.parallel
    if config.pin_cores and hasattr(os, "sched_getaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // config.parallel
        if not each:
            raise ValueError(
                f"local.parallel={config.parallel}: there are {len(cores)} cores; run so many, or "
                "let members share them with local.pin_cores=False"
            )
        shares = [tuple(cores[i * each : (i + 1) * each]) for i in range(config.parallel)]
    devices = config.cuda_devices or (None,) * config.parallel
    return [Slot(*both) for both in zip(shares, devices, strict=True)]


def _start(job: Job, start: int, slot: Slot) -> _Running:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log, _pinned(slot.cores):
        child = subprocess.Popen(
            job.command,
            env=slot.env(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for us to pass on
        )
    return _Running(job, start, slot, child, time.monotonic())


@contextlib.contextmanager
def _pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """Keep this thread to some cores meanwhile: a process started now stays on them."""
    before = os.sched_getaffinity(0) if cores else None
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _watch_signals() -> Iterator[list[int]]:
    """Yield a list that every signal to stop adds itself to."""
    asked: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)  # a terminal is gone
    before = [signal.signal(number, lambda found, _: asked.append(found)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _told_to_leave_on_error(running: Sequence[_Running]) -> Iterator[None]:
    """Let what runs save and leave where this process fails: nobody would watch it."""
    try:
        yield
    except BaseException:
        for each in running:
            each.child.send_signal(signal.SIGTERM)
        raise


def _pass_on(running: Sequence[_Running], times: int, table: LiveTable) -> None:
    """Tell all that run to save and leave, or, asked again, end them."""
    for each in running:
        if times == 1:
            each.child.send_signal(signal.SIGTERM)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.child.pid, signal.SIGKILL)
    names = ", ".join(each.job.name for each in running) or "nothing"
    table.say(
        f"stopping: {names}; the same command goes on. Once more ends them without saving"
        if times == 1
        else f"killed: {names}"
    )
