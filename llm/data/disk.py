"""Files that are whole or absent, and what identifies their content, on disk or an object store.
Every file the data package leaves behind is written through here."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

_CHUNK_BYTES = 1 << 24


def is_store(path: epath.PathLike) -> bool:
    """Return whether a path lies on an object store: gs://, s3://."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def written_aside(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yield a local path to write to; on leaving without an error it becomes `path`, in one step.

    So a killed process leaves no half file under the name, and of two processes, or threads, that
    write the same file each finds a whole one.
    """
    path = epath.Path(path)
    if is_store(path):
        with tempfile.TemporaryDirectory() as folder:
            aside = pathlib.Path(folder) / path.name
            yield aside
            with open(aside, "rb") as local, path.open("wb") as put:  # there once it is closed
                shutil.copyfileobj(local, put, _CHUNK_BYTES)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share a disk may have equal process ids.
    writer = f"{platform.node()}.{threading.get_ident()}.{os.getpid()}"
    aside = pathlib.Path(path.with_name(f"{path.name}.{writer}.tmp"))
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(directory: epath.PathLike) -> None:
    """Delete what `written_aside` of killed processes of this host left anywhere below."""
    if is_store(directory):  # which has no half files
        return
    for path in pathlib.Path(directory).rglob(f"*.{platform.node()}.*.tmp"):
        process = path.name.split(".")[-2]
        try:
            os.kill(int(process), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue  # another user's, or not ours


def read_json_object(path: epath.PathLike) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, no JSON, nested too deeply, or no object; names the file.
    """
    text = epath.Path(path).read_bytes()
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def load_arrays(path: epath.PathLike, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return arrays of a NumPy archive by their names; nothing in it is unpickled."""
    path = epath.Path(path)
    file = io.BytesIO(path.read_bytes()) if is_store(path) else path
    with np.load(file, allow_pickle=False) as saved:
        return {name: saved[name] for name in names}


def save_arrays(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write a NumPy archive, whole or not at all; equal arrays make equal bytes."""
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def write_json(path: epath.PathLike, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def file_facts(path: epath.PathLike) -> dict[str, object]:
    """Return size and SHA-256 of what is stored in a file."""
    digest, size = hashlib.sha256(), 0
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}
