"""A lock on an object store: an object that only one process can create, renewed while it lives.

Who finds one takes it for dead when it was not renewed for `STALE_SECONDS`: by its holder's clock,
or, as clocks can disagree, by having watched it for so long.
"""

import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

from llm.training.store_paths import StorePath

RENEW_SECONDS = 20.0
STALE_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # between two processes that take over the same dead lock, the last one wins
_POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


class WorkdirInUseError(RuntimeError):
    """Another live process is running in the workdir."""


def describe_self() -> dict[str, Any]:
    """Return what a lock says of its holder."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe_holder(text: bytes) -> str:
    """Return who holds a lock, from its content."""
    try:
        about = json.loads(text)
        return f"process {about['pid']} on host {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process (its name is not written yet)"


class Lease:
    """The right to write in a workdir on a store; a thread renews it until `release`."""

    def __init__(self, path: StorePath):
        self._path = path
        self._about = describe_self() | {"token": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._renewer: threading.Thread | None = None
        self._renewed = 0.0  # by the monotonic clock
        self._lost = ""

    def acquire(self) -> None:
        """Take the lock. Where there is one, wait until its holder has renewed it, or has not.

        Raises:
          WorkdirInUseError: another process, named with its host, holds it.
        """
        found, deadline = None, 0.0
        while not self._create():
            holder = self._read()
            if holder is None:
                continue  # given up between our two questions
            if found is None:
                found, deadline = holder, time.monotonic() + STALE_SECONDS
                if not _is_stale(holder):
                    log.warning(
                        "%s: locked by %s; waiting to see whether it lives (%.0f s at most)",
                        self._path.parent, describe_holder(holder), STALE_SECONDS,
                    )  # fmt: skip
            elif holder != found:
                raise self._in_use(holder)
            if _is_stale(holder) or time.monotonic() > deadline:
                self._path.unlink(missing_ok=True)
                continue
            time.sleep(_POLL_SECONDS)
        if found is not None:
            time.sleep(SETTLE_SECONDS)
            holder = self._read()
            if not self._is_ours(holder):
                raise self._in_use(holder or b"")
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise where the lock was lost; asks nobody.

        Raises:
          WorkdirInUseError: another process has taken it, or may have by now.
        """
        if self._renewer is None:
            return
        age = time.monotonic() - self._renewed
        if not self._lost and age > STALE_SECONDS:
            self._lost = f"it could not be renewed for {age:.0f} s, and another run may have it"
        if self._lost:
            raise WorkdirInUseError(
                f"workdir {self._path.parent}: this run has lost its lock: {self._lost}. Started "
                "again it goes on from the last checkpoint, when the other one has ended"
            )

    def release(self) -> None:
        """Remove the lock, if it is still ours; a second call does nothing."""
        if self._renewer is None:
            return
        self._ended.set()
        self._renewer.join()
        self._renewer = None
        try:
            if self._is_ours(self._read()):
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays, for %.0f s: %s", self._path, STALE_SECONDS, error)

    def _create(self) -> bool:
        started = time.monotonic()
        try:
            self._path.create(self._content())
        except FileExistsError:
            return False
        self._renewed = started
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            started = time.monotonic()
            try:
                holder = self._read()
                if not self._is_ours(holder):
                    self._lost = f"{describe_holder(holder) if holder else 'somebody'} took it away"
                    return
                self._path.write_bytes(self._content())
                self._renewed = started
            except OSError as error:
                log.warning("%s cannot be renewed, which is tried again: %s", self._path, error)

    def _content(self) -> bytes:
        return json.dumps(self._about | {"renewed": time.time()}).encode()

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_ours(self, holder: bytes | None) -> bool:
        return holder is not None and self._about["token"].encode() in holder

    def _in_use(self, holder: bytes) -> WorkdirInUseError:
        return WorkdirInUseError(
            f"workdir {self._path.parent} is in use by {describe_holder(holder)}; "
            "wait for it, end it, or choose another workdir"
        )


def _is_stale(holder: bytes) -> bool:
    try:
        return time.time() - json.loads(holder)["renewed"] > STALE_SECONDS
    except (ValueError, KeyError, TypeError):
        return False
