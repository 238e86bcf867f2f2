"""File operations that survive a crash: atomic writes, JSON lines, SHA-256 of what is on disk.
Checkpoints, logs and configs are written through here, on a file system or an object store."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from llm.training import appended
from llm.training.store_paths import StoreError, StorePath

_CHUNK_BYTES = 1 << 22


def is_local(path: epath.PathLike) -> bool:
    """Return whether the path is on a file system of this machine, not gs:// or s3://."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that means the same from every directory, as Orbax demands; "~" is home.

    Raises:
      StoreError: nothing is known of the path's scheme.
    """
    try:
        path = epath.Path(path)
    except KeyError as error:
        raise StoreError(
            f"{path}: there is no kind of object store called {error}; gs:// and s3:// are two"
        ) from None
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def canonical_json(value: Any) -> str:
    """Return the one text that stands for a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: epath.Path) -> tuple[str, int]:
    """Return the SHA-256 (hexadecimal) and size in bytes of what is stored in a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def fsync(path: epath.Path) -> None:
    """Ask the operating system to bring a local file or directory to the disk itself."""
    if not is_local(path):
        return
    descriptor = os.open(os.fspath(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: epath.Path, text: str) -> None:
    """Write a whole file so that a reader, or a crash, sees the old text or the new one."""
    if isinstance(path, StorePath):
        path.write_text(text)
        return
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.write_text(text)
    fsync(temporary)  # or a power cut could keep the new name with an empty file
    temporary.replace(path)
    fsync(path.parent)


def append_json_line(path: epath.Path, value: dict[str, Any]) -> None:
    """Add one JSON object as a line, on a line of its own even after a torn write."""
    line = canonical_json(value) + "\n"
    if isinstance(path, StorePath):
        appended.add_part(path, line.encode())
        return
    _join_parts(path)
    if path.exists():
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    line = "\n" + line
    with path.open("a") as stream:
        stream.write(line)
    fsync(path)


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a line torn by a crash is left out."""
    rows = []
    for line in appended.read_all(path)[0].split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also covers bytes that are no UTF-8
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def open_to_append(
    path: epath.Path, keep: Callable[[bytes], bytes], guard: Callable[[], None]
) -> appended.LocalAppender | appended.StoreAppender:
    """Open a file for adding lines, after cutting it to what `keep` returns of its content.

    `guard` is called before each put on a store: it raises where this process may write no more.
    """
    content, end = appended.read_all(path)
    kept = keep(content)
    if kept != content:
        _write_whole(path, kept)
        end = len(kept)
    if isinstance(path, StorePath):
        return appended.StoreAppender(path, end, guard)
    _join_parts(path)
    return appended.LocalAppender(path)


def _write_whole(path: epath.Path, content: bytes) -> None:
    """Let a file be its content and no parts. Readers pass over parts that it reaches beyond."""
    write_atomically(path, content.decode())
    appended.parts_directory(path).rmtree(missing_ok=True)


def _join_parts(path: epath.Path) -> None:
    """Bring the parts of a file that was copied from a store into the file itself."""
    if appended.parts_directory(path).exists():
        _write_whole(path, appended.read_all(path)[0])


@contextlib.contextmanager
def local_copy(directory: epath.Path, names: Sequence[str] | None = None) -> Iterator[epath.Path]:
    """Give a directory for reading: itself, or a temporary copy of what lies on a store.

    The copy is of all files, or of those of some names that there are.
    """
    if not isinstance(directory, StorePath):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="from_store_") as temporary:
        copy = epath.Path(temporary) / directory.name
        copy.mkdir()
        directory.download(copy, names)
        yield copy


@contextlib.contextmanager
def local_directory(directory: epath.Path) -> Iterator[epath.Path]:
    """Give a directory for writing: itself, or a temporary one whose files are then put there."""
    if not isinstance(directory, StorePath):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="to_store_") as temporary:
        yield epath.Path(temporary)
        files = [path for path in pathlib.Path(temporary).rglob("*") if path.is_file()]
        directory.upload(
            epath.Path(temporary), [path.relative_to(temporary).as_posix() for path in files]
        )
