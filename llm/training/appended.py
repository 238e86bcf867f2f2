"""Files that grow by lines, on a file system and on object stores, which cannot append.

There what follows a file lies beside it in objects, each named by the byte at which it begins:
`metrics.jsonl.parts/000000004096`. A reader takes file and parts for one, wherever they lie.
"""

import concurrent.futures
import os
import time
from collections.abc import Callable

from etils import epath

from llm.training.store_paths import StorePath

_PART_BYTES = 1 << 18  # a part grows to this size, put anew each time; then the next one begins
_PUT_SECONDS = 30.0
_READERS = 16


def parts_directory(path: epath.Path) -> epath.Path:
    """Return where the parts of a file lie."""
    return path.parent / f"{path.name}.parts"


def read_all(path: epath.Path) -> tuple[bytes, int]:
    """Return a file and its parts as one, and the byte at which a next part would begin.

    Of neither, b"" and 0.
    """
    pieces = _pieces(path)
    content, end = [], 0
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        read = readers.map(lambda piece: piece[1].read_bytes(), pieces)
        for (start, _), data in zip(pieces, read, strict=True):
            if start >= end:  # else it is in the file already, and a crash has left it
                content.append(data)
                end = start + len(data)
    return b"".join(content), end


def add_part(path: StorePath, data: bytes) -> None:
    """Put what is added to a file on a store as one new part, after whatever is there."""
    while True:
        pieces = _pieces(path)
        start = pieces[-1][0] + pieces[-1][1].stat().length if pieces else 0
        if [piece for _, piece in pieces] == [path]:
            data = b"\n" + data.lstrip(b"\n")  # a file from elsewhere, its last line torn perhaps
        try:
            return _part(path, start).create(data)
        except FileExistsError:
            continue  # another process was there first


class LocalAppender:
    """Adds bytes to the end of a file, at once: a killed process loses none of them."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._file = open(os.fspath(path), "ab", buffering=0)  # what is refused is known at once
        self._size_bytes = self._file.tell()
        self._unwritten = b""

    def append(self, data: bytes) -> None:
        """Add whole lines.

        Raises:
          OSError: the disk is full, perhaps. They are kept, and written with the next ones.
        """
        self._unwritten += data
        self._flush()

    def sync(self) -> int:
        """Bring everything to the disk itself and return the file's size in bytes.

        Raises:
          OSError: it cannot be written.
        """
        self._flush()
        os.fsync(self._file.fileno())
        return self._size_bytes

    def close(self) -> None:
        """Write what could not be written before, and close.

        Raises:
          OSError: it cannot be written now either.
        """
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        written = 0
        try:
            while written < len(self._unwritten):
                written += self._file.write(self._unwritten[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._size_bytes)  # no torn line stays
            raise
        self._size_bytes += written
        self._unwritten = b""


class StoreAppender:
    """Adds bytes to the end of a file on a store: they gather in memory, and its last part is put
    anew at each `sync`, at `close`, and else every half a minute in which there are more.

    `guard` is called before each put, and raises where this process may not write any more.
    """

    def __init__(self, path: StorePath, start: int, guard: Callable[[], None]):
        self._path, self._guard = path, guard
        self._start = start  # of the part that grows
        self._part, self._put_bytes = b"", 0
        self._put_time = time.monotonic()

    def append(self, data: bytes) -> None:
        """Add whole lines.

        Raises:
          OSError: a put failed. They are kept, and put with the next ones.
        """
        self._part += data
        if time.monotonic() - self._put_time > _PUT_SECONDS:
            self._put()

    def sync(self) -> int:
        """Put what is not yet there, and return the size of the file and its parts in bytes.

        Raises:
          OSError: the put failed.
        """
        self._put()
        return self._start + len(self._part)

    def close(self) -> None:
        """Put what is not yet there.

        Raises:
          OSError: the put failed.
        """
        self._put()

    def _put(self) -> None:
        self._put_time = time.monotonic()  # after a failure too: the next try can wait
        if len(self._part) == self._put_bytes:
            return
        self._guard()
        _part(self._path, self._start).write_bytes(self._part)
        self._put_bytes = len(self._part)
        if self._put_bytes >= _PART_BYTES:
            self._start += self._put_bytes
            self._part, self._put_bytes = b"", 0


def _pieces(path: epath.Path) -> list[tuple[int, epath.Path]]:
    """Return the file and its parts, each with the byte at which it begins, in order."""
    pieces = [(0, path)] if path.exists() else []
    directory = parts_directory(path)
    if directory.exists():
        parts = [part for part in directory.iterdir() if part.name.isdecimal()]
        pieces += sorted((int(part.name), part) for part in parts)
    return pieces


def _part(path: StorePath, start: int) -> StorePath:
    return parts_directory(path) / f"{start:012d}"
