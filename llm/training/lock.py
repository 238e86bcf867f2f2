"""One run a workdir: an advisory lock that ends with its process, however that process ends.
A lock file left by a dead process holds nothing, so it never blocks."""

import datetime
import fcntl
import json
import os
import socket
import weakref

from etils import epath

from llm.training.files import is_local


class WorkdirInUseError(RuntimeError):
    """Another live process is running in the workdir."""


class Lock:
    """The right to write in a workdir, held from `acquire` to `release` or the process's end.

    On an object store there is no such lock and `acquire` does nothing.
    """

    def __init__(self, workdir: epath.PathLike):
        self._path = epath.Path(workdir) / "run.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
          WorkdirInUseError: another process, named with its host, holds it.
        """
        if not is_local(self._path):
            return
        descriptor = os.open(os.fspath(self._path), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _describe_holder(os.read(descriptor, 4096))
            os.close(descriptor)
            raise WorkdirInUseError(
                f"workdir {self._path.parent} is in use by {holder}; "
                "wait for it, end it, or choose another workdir"
            ) from error
        self._descriptor = descriptor
        _close_in_forks(self)
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._descriptor is not None:
            # The file stays: removing it could take away one that another run has just locked.
            os.ftruncate(self._descriptor, 0)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _close_in_forks(lock: Lock) -> None:
    # A forked child (a loader worker) shares the open file: it would hold the lock after us.
    reference = weakref.ref(lock)

    def close() -> None:
        held = reference()
        if held is not None:
            held._close()

    os.register_at_fork(after_in_child=close)


def _describe_holder(text: bytes) -> str:
    try:
        about = json.loads(text)
        return f"process {about['pid']} on host {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process (its name is not written yet)"
