"""File operations that survive a crash: atomic writes, JSON lines, SHA-256 of what is on disk.
Checkpoints and configs are written through here, so a torn file has one place to come from."""

import hashlib
import json
import os
from typing import Any

from etils import epath

_CHUNK_BYTES = 1 << 22


def is_local(path: epath.Path) -> bool:
    """Return whether the path is on a file system of this machine, not gs:// or s3://."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that means the same from every directory, as Orbax demands; "~" is home."""
    path = epath.Path(path)
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
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.write_text(text)
    fsync(temporary)  # or a power cut could keep the new name with an empty file
    temporary.replace(path)
    fsync(path.parent)


def append_json_line(path: epath.Path, value: dict[str, Any]) -> None:
    """Add one JSON object as a line, on a line of its own even after a torn write."""
    line = canonical_json(value) + "\n"
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
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # also covers bytes that are no UTF-8
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
