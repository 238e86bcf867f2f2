"""One run a workdir: an advisory lock that ends with its process, however that process ends.

A lock file left by a dead process holds nothing, so it never blocks. On an object store the lock is
a lease (llm/training/lease.py): a dead process's ends when it has not been renewed for a while.
"""

import fcntl
import json
import os
import weakref

from etils import epath

from llm.training.files import absolute
from llm.training.lease import Lease, WorkdirInUseError, describe_holder, describe_self
from llm.training.store_paths import StorePath


class Lock:
    """The right to write in a workdir, held from `acquire` to `release` or the process's end."""

    def __init__(self, workdir: epath.PathLike):
        self._path = absolute(workdir) / "run.lock"
        self._descriptor: int | None = None
        self._lease = Lease(self._path) if isinstance(self._path, StorePath) else None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
          WorkdirInUseError: another process, named with its host, holds it.
        """
        if self._lease is not None:
            self._lease.acquire()
            return
        descriptor = os.open(os.fspath(self._path), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = describe_holder(os.read(descriptor, 4096))
            os.close(descriptor)
            raise WorkdirInUseError(
                f"workdir {self._path.parent} is in use by {holder}; "
                "wait for it, end it, or choose another workdir"
            ) from error
        self._descriptor = descriptor
        _close_in_forks(self)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(describe_self()).encode(), 0)

    def check(self) -> None:
        """Raise where the lock was lost, as it can be on an object store; asks nobody.

        Raises:
          WorkdirInUseError: another run may be writing in the workdir by now.
        """
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._lease is not None:
            self._lease.release()
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
