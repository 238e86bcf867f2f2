"""The last word when C++ ends the process: JAX aborts it when a run's processes lose each other.
Ground floor. Its own message names nobody, and there is no callback that Python could be."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator

# EX_PROTOCOL of sysexits.h: another process of the run failed. Run the same command again, with as
# many processes or with others, and it goes on from the last checkpoint.
LOST_PEER_EXIT_CODE = 76


@contextlib.contextmanager
def last_word(leave: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `leave` where the process is about to abort; it should not return.

    It runs in the thread that aborts, which holds no lock of Python's.
    """
    library = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    handler = handler_type(lambda number: leave())
    # Python's own handlers run in the main thread, and abort() does not wait for it.
    before = library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGABRT, before)


def leave_now(message: str, code: int) -> None:
    """Say a last line on standard error and end the process at once, whatever its threads do."""
    os.write(2, f"\n{message}\n".encode())  # the stream may be locked by a thread that waits
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
