"""The processes of one run watch each other: one that dies or hangs is named, and the others leave.
Without that they would wait for it in a collective for ever."""

import contextlib
import json
import linecache
import logging
import os
import socket
import sys
import threading
import time
from types import FrameType

import jax
from jax._src import distributed  # its key-value store has no public name; Orbax does the same

from llm.parallel.aborts import LOST_PEER_EXIT_CODE, last_word, leave_now
from llm.training.signs import Heard, Sign, describe, find_dead, find_hanging, hear

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 30.0  # a heartbeat is a thread of Python's, which a busy machine holds up
_SOON_BEATS = 3  # so many missed ones are enough where a collective has failed as well
_PATIENT_FACTOR = 4  # a first step, which compiles, and an evaluation may take so much longer
_LEAVE_SECONDS = 30.0  # from an error to the end of the process
_MEETING_MILLISECONDS = 24 * 3600 * 1000  # who does not come is named by the watch, long before
_LIBRARIES = ("jax", "jaxlib", "orbax")

log = logging.getLogger(__name__)


class Peers:
    """Watches the other processes of a run in a `with` statement. Alone it does nothing.

    Every second or so a process puts a sign of life into the key-value store of `jax.distributed`,
    which process 0 keeps, and reads the others'. Where this process stands still and a peer is
    silent, that one is dead; where it stands still for `hang_timeout_seconds`, whoever is furthest
    behind hangs. Then the process ends with LOST_PEER_EXIT_CODE, from a thread: its main thread may
    be in a collective that nobody will finish. A checkpoint bears that at any time.
    """

    def __init__(self, group: str, hang_timeout_seconds: float):
        """`group` is the same text in all processes of the run and belongs to no other run."""
        self._index, self._count = jax.process_index(), jax.process_count()
        self._group, self._hang_seconds = f"peers/{group}/", hang_timeout_seconds
        # The store is one small server; a thousand processes must not ask it all at once.
        self._beat_seconds = max(_BEAT_SECONDS, self._count / 64)
        self._silent_seconds = max(
            _SOON_BEATS * self._beat_seconds, min(_SILENT_SECONDS, hang_timeout_seconds / 2)
        )
        self._step, self._moves, self._patient, self._done = 0, 0, True, False
        self._moved = self._heard_until = time.monotonic()
        self._signs: dict[int, Heard] = {}
        self._verdict = ""  # why all leave: what the first to know has published
        self._failing = ""  # an error of this process
        self._paused = ""  # where this process itself stood still
        self._deadline = float("inf")
        self._loop: FrameType | None = None
        self._main = threading.get_ident()
        self._leaving = threading.Lock()
        self._stop = threading.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Peers":
        if self._count > 1:
            self._store = distributed.global_state.client
            self._loop = _first_frame_outside(("llm", "contextlib"))
            self._stack.enter_context(last_word(self._on_abort))
            self._exchanger = threading.Thread(target=self._exchange, name="signs", daemon=True)
            self._exchanger.start()
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
            self._await_all()
        return self

    def __exit__(self, exc_type, error: BaseException | None, traceback) -> None:
        if error is not None:
            self.failed(error)
        self._done = True
        self._stop.set()
        if self._count > 1:
            self._exchanger.join(_SOON_BEATS * self._beat_seconds)  # it may hang with process 0
        self._stack.close()
        self._loop = None

    def moved(self, step: int, *, patient: bool = False) -> None:
        """Say that this process is one place further. With `patient` the next may take long."""
        self._step, self._patient, self._moved = step, patient, time.monotonic()
        self._moves += 1

    def meet(self, place: str) -> None:
        """Wait until all processes have come to a place, longer than a collective would."""
        if self._count > 1:
            self._store.wait_at_barrier(self._group + place, _MEETING_MILLISECONDS)

    def failed(self, error: BaseException) -> None:
        """Leave if an error's cause is a peer; else tell the others to, and give time to end."""
        ordered = isinstance(error, SystemExit)
        if self._count == 1 or ordered or self._deadline < float("inf"):
            return
        self._failing = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        soon = _SOON_BEATS * self._beat_seconds
        until = time.monotonic() + 2 * soon
        while time.monotonic() < until:
            cause = self._verdict or self._find_dead(soon)
            if cause:
                self._leave(f"{cause} (seen here: {self._failing})")
            time.sleep(0.1)
        self._deadline = time.monotonic() + _LEAVE_SECONDS
        self._verdict = f"{describe(self._signs, self._index)} failed: {self._failing}"
        time.sleep(2 * self._beat_seconds)  # for the others to read it: process 0 keeps the store

    def _await_all(self) -> None:
        """Wait until all processes are here: they prepare data, and collectives do not wait long.

        JAX ends this process where one of them is gone before.
        """
        told = time.monotonic() + _SILENT_SECONDS
        while absent := self._absent():
            if time.monotonic() > told:
                told = float("inf")
                log.warning("waiting for process %s to start this run", absent)
            time.sleep(self._beat_seconds / 4)

    def _absent(self) -> str:
        return ", ".join(str(i) for i in range(self._count) if i not in self._signs)

    # ------------------------------------------------------------------------- signs of life

    def _exchange(self) -> None:
        """Publish own signs and read the others', until this process is done."""
        last = False
        while not last:
            last = self._stop.is_set()
            with contextlib.suppress(Exception):  # the store is away: `_watch` sees for how long
                self._publish()
                now, signs = time.monotonic(), dict(self._signs)
                for key, value in self._store.key_value_dir_get(self._group):
                    name = key.rpartition("/")[2]
                    if name == "verdict":
                        self._verdict = self._verdict or value
                    else:
                        hear(signs, int(name), Sign(*json.loads(value)), now)
                self._signs, self._heard_until = signs, now  # whole: other threads read them
            self._stop.wait(self._beat_seconds)

    def _publish(self) -> None:
        place, waits = self._whereabouts()
        sign = Sign(
            socket.gethostname(), os.getpid(), time.time(), self._moves, self._step,
            place, waits, self._done,
        )  # fmt: skip
        self._store.key_value_set(
            f"{self._group}{self._index}", json.dumps(sign), allow_overwrite=True
        )
        if self._verdict:
            with contextlib.suppress(Exception):  # there is one already: the first stands
                self._store.key_value_set(f"{self._group}verdict", self._verdict)

    def _whereabouts(self) -> tuple[str, bool]:
        """Return the line that the loop is at, and whether the main thread waits in a library."""
        if self._failing:
            return self._failing, False
        file, line = self._loop.f_code.co_filename, self._loop.f_lineno
        place = f"{os.path.basename(file)}:{line} `{linecache.getline(file, line).strip()}`"
        frame = sys._current_frames().get(self._main)
        while frame is not None and frame is not self._loop:
            if _package(frame) in _LIBRARIES:
                return place, True
            frame = frame.f_back
        return place, False

    # ------------------------------------------------------------------------- the watch

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._beat_seconds / 4):
            now = time.monotonic()
            if now - last > self._silent_seconds / 2:  # stopped, or its machine was
                self._paused = f"; this process itself had stood still for {now - last:.0f} s"
                self._moved = self._heard_until = now
                self._signs = {i: Heard(heard.sign, now) for i, heard in self._signs.items()}
            last = now
            if self._deadline < float("inf"):
                if now > self._deadline:
                    leave_now(f"{self._verdict}; its other threads do not end", 1)
            elif not self._failing and (cause := self._find_cause(now)):
                self._leave(cause, linger=cause != self._verdict or not self._index)

    def _find_cause(self, now: float) -> str:
        """Return why to leave; "" while there is no reason."""
        still = now - self._moved
        if self._verdict or still < self._silent_seconds:
            return self._verdict
        dead = self._find_dead(self._silent_seconds)
        patience = self._hang_seconds * (_PATIENT_FACTOR if self._patient else 1)
        if dead or still < patience:
            return dead
        return find_hanging(self._signs, self._count, still)

    def _find_dead(self, silent_seconds: float) -> str:
        away = time.monotonic() - self._heard_until
        if self._index and away > silent_seconds:
            return self._coordinator_gone(f"no answer for {away:.0f} s")
        return find_dead(self._signs, self._index, self._heard_until, silent_seconds)

    def _coordinator_gone(self, how: str) -> str:
        return f"{describe(self._signs, 0)}, which coordinates the run, is gone: {how}"

    def _on_abort(self) -> None:
        """JAX ends the process: the store is gone, or tells of a peer that is."""
        if self._failing:
            time.sleep(_LEAVE_SECONDS)  # the main thread ends it with its own error
        soon = _SOON_BEATS * self._beat_seconds
        cause = self._verdict or find_dead(self._signs, self._index, self._heard_until, soon)
        if not cause:
            absent = self._absent()
            cause = f"process {absent} did not come" if absent else "see JAX's error above"
            if self._index:
                cause = self._coordinator_gone("the connection to it broke")
        self._leave(cause, linger=False)

    def _leave(self, cause: str, *, linger: bool = True) -> None:
        self._leaving.acquire()  # for good: the first thread has the last word
        self._verdict = self._verdict or cause
        if linger:
            time.sleep(2 * self._beat_seconds)  # `_exchange` tells the others, or they read
        leave_now(
            f"process {self._index} leaves (exit code {LOST_PEER_EXIT_CODE}): {cause}"
            f"{self._paused}. The same "
            "command goes on from the last checkpoint, with as many processes or with others",
            LOST_PEER_EXIT_CODE,
        )


def _first_frame_outside(packages: tuple[str, ...]) -> FrameType:
    frame = sys._getframe(1)
    while _package(frame) in packages and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
