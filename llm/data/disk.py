"""Files that are whole or absent, and what identifies their content.
Every file the data package leaves on disk is written through here."""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

from etils import epath


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a path to write to; on leaving without an error it becomes `path`, in one step.

    So a killed process leaves no half file under the name, and of two processes that write the
    same file each finds a whole one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share a disk may have equal process ids.
    aside = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(directory: pathlib.Path) -> None:
    """Delete what `written_aside` of killed processes of this host left anywhere below."""
    for path in directory.rglob(f"*.{platform.node()}.*.tmp"):
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


def write_json(path: pathlib.Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def file_facts(path: pathlib.Path) -> dict[str, object]:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {
            "size": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
