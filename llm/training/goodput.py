"""Where a run's time goes: training steps, and by cause all that is not. Second floor.
Every second from a process's start, or that of a job's stage, to its run's end has one cause."""

import contextlib
import dataclasses
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

import jax.monitoring
from etils import epath

from llm.training.files import is_local, write_atomically

TRAIN = "train"
# start: imports, data, initialisation. redo: steps that an earlier start or a rewind had done.
# evaluate: all that a loop does beside its steps. compile: tracing, lowering, XLA, its cache.
CAUSES = (TRAIN, "redo", "start", "compile", "restore", "stall", "save", "evaluate")
GOODPUT = "goodput"  # in the workdir: one file for each start
_WRITE_SECONDS, _WRITE_SECONDS_REMOTE = 5.0, 30.0


def _process_age_seconds() -> float:
    """Return how long ago this process started; 0 where the system does not tell."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine's boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


# The process's time is one thing, whatever runs share it: since when it belongs to none of them.
_free_since = time.monotonic() - _process_age_seconds()


def start_stage() -> None:
    """Let what the process did until now count for no run: the next one begins here."""
    global _free_since
    _free_since = time.monotonic()


class Goodput:
    """A stopwatch that always runs for one cause. Compilations are told by JAX and taken out.

    The first run of a process begins with the process, a later one where the one before ended. It
    keeps its count in the workdir, so that starts add up: see `read_goodput`.
    """

    def __init__(self, workdir: epath.PathLike):
        self._folder = epath.Path(workdir) / GOODPUT
        self._path: epath.Path | None = None
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._cause, self._since = "start", _free_since
        self._compiled: list[tuple[float, float]] = []  # of the cause under way, not overlapping
        self._thread = threading.get_ident()
        self._last_step = self._reached = 0
        self._written, self._listening = 0.0, False

    def listen(self) -> None:
        """Let JAX tell of its compilations, until `close`."""
        self._listening = True
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far, by cause."""
        self.enter(self._cause)
        return dict(self._seconds)

    def enter(self, cause: str) -> None:
        """From now on the time is this cause's."""
        now = time.monotonic()
        compiling = sum(end - begin for begin, end in self._compiled)
        self._seconds["compile"] += compiling
        self._seconds[self._cause] += max(0.0, now - self._since - compiling)
        self._cause, self._since = cause, now
        self._compiled.clear()

    @contextlib.contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """Count what happens inside for a cause, and then go on with the one before."""
        before = self._cause
        self.enter(cause)
        try:
            yield
        finally:
            self.enter(before)

    def enter_step(self, step: int) -> None:
        """From now on the time is that of a step: training, or doing again what was done."""
        self.enter(TRAIN if step > self._reached else "redo")

    def open(self, step: int) -> None:
        """Begin the record of a start that goes on from a step."""
        self._last_step = step
        self._reached = max((row["last_step"] for row in _read_rows(self._folder)), default=0)
        self._path = self._folder / f"{time.time_ns()}.json"

    def after_step(self, step: int) -> None:
        """Note a step as done, in the record too when it is some seconds old."""
        self._last_step = max(self._last_step, step)
        every = _WRITE_SECONDS if is_local(self._folder) else _WRITE_SECONDS_REMOTE
        if time.monotonic() - self._written >= every:
            self.write()

    def describe_start(self) -> str:
        """Return in words how long the start took until now, and what it went into."""
        told = [f"{cause} {x:.1f}" for cause, x in self.seconds.items() if x >= 0.05]
        return f"after {sum(self._seconds.values()):.1f} s" + (
            f" ({', '.join(told)})" if told else ""
        )

    def rewind(self) -> None:
        """Expect the steps so far to be done again."""
        self._reached = max(self._reached, self._last_step)

    def write(self) -> None:
        """Bring the record to the workdir. A disk without room is no reason to end a run."""
        if self._path is None:
            return
        row = {
            "last_step": self._last_step,
            "seconds": {cause: round(x, 3) for cause, x in self.seconds.items()},
        }
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(row) + "\n")
        self._written = time.monotonic()

    def close(self) -> None:
        """Write the record; the process's time is free for another run."""
        global _free_since
        self.enter(self._cause)
        self.write()
        if self._listening:
            jax.monitoring.unregister_event_duration_listener(self._on_event)
            self._listening = False
        _free_since = self._since

    def _on_event(self, event: str, seconds: float, **_) -> None:
        if not event.startswith("/jax/core/compile/") or threading.get_ident() != self._thread:
            return
        now = time.monotonic()
        begin = max(now - seconds, self._since)
        while self._compiled and self._compiled[-1][1] > begin:  # a part of this one, told before
            begin = min(begin, self._compiled.pop()[0])
        self._compiled.append((begin, now))


@dataclasses.dataclass(frozen=True)
class GoodputReport:
    """Seconds by cause, over all starts of a run; time between starts is in none."""

    seconds: Mapping[str, float]
    starts: int

    @property
    def total_seconds(self) -> float:
        """Seconds that processes of the run have lived."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of it that went into steps that were not done before."""
        return self.seconds[TRAIN] / max(self.total_seconds, 1e-9)

    def describe(self) -> str:
        """Return it in words: "goodput 91.2% of 0:03:12 over 2 starts (start 4.1%, …)"."""
        shares = {
            cause: x / max(self.total_seconds, 1e-9)
            for cause, x in self.seconds.items()
            if cause != TRAIN
        }
        told = [f"{cause} {share:.1%}" for cause, share in shares.items() if share >= 0.0005]
        minutes, seconds = divmod(round(self.total_seconds), 60)
        starts = f" over {self.starts} starts" if self.starts > 1 else ""
        rest = f" ({', '.join(told)})" if told else ""
        return (
            f"goodput {self.goodput:.1%} of {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
            f"{starts}{rest}"
        )


def read_goodput(workdir: epath.PathLike) -> GoodputReport:
    """Return where the time of a workdir's run has gone so far; zeros where nothing is kept.

    Of a start that was killed the last seconds are unknown: some 5, on object stores 30.
    """
    rows = _read_rows(epath.Path(workdir) / GOODPUT)
    seconds = {cause: sum(row["seconds"].get(cause, 0.0) for row in rows) for cause in CAUSES}
    return GoodputReport(seconds, len(rows))


def find_goodput(workdir: epath.PathLike) -> dict[str, GoodputReport]:
    """Return the reports of all runs below a job's directory, by their paths in it."""
    workdir = epath.Path(workdir)
    # A run in a job, or in one of its studies; epath has no "**".
    folders = [*workdir.glob(f"*/{GOODPUT}"), *workdir.glob(f"*/*/{GOODPUT}")]
    return {
        folder.parent.relative_to(workdir).as_posix(): read_goodput(folder.parent)
        for folder in sorted(folders)
    }


def sum_goodput(reports: Iterable[GoodputReport]) -> GoodputReport:
    """Return the report of several runs together."""
    reports = list(reports)
    seconds = {cause: sum(report.seconds[cause] for report in reports) for cause in CAUSES}
    return GoodputReport(seconds, sum(report.starts for report in reports))


def _read_rows(folder: epath.Path) -> list[dict]:
    if not folder.exists():
        return []
    rows = []
    for path in folder.iterdir():
        if path.suffix == ".json" and not path.name.startswith("."):
            with contextlib.suppress(OSError, ValueError):
                rows.append(json.loads(path.read_text()))
    return rows
