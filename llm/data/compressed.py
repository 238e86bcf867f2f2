"""Files as byte streams, unpacked on the way: .gz .bz2 .xz .zst, local or gs://.
Used by the readers of sources of kind "files"."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

# What Python and its unpackers raise on a file that is damaged, cut off or gone.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    # Not the library zstandard: it takes a cut-off file for one that ends there, silently.
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))


_OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[IO[bytes]]:
    """Open a local or remote file for reading, unpacking it if its ending says so."""
    packing = split_endings(path)[1]
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(path).open("rb"))
        if packing:
            file = stack.enter_context(_OPENERS[packing](file))
        yield file


def split_endings(path: str) -> tuple[str, str]:
    """Return the endings of content and packing: (".jsonl", ".gz"), or (".txt", "")."""
    stem, ending = os.path.splitext(path.lower())
    if ending in _OPENERS:
        return os.path.splitext(stem)[1], ending
    return ending, ""


def read_line(file: Any, limit: int) -> tuple[bytes | None, int]:
    """Return a file's next line and its length; None in its place if it exceeds the limit."""
    line = file.readline(limit)
    if len(line) < limit or line.endswith(b"\n"):
        return line, len(line)
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(2**20)
        length += len(line)
    return None, length
