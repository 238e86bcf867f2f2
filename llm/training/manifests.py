"""MANIFEST.json, written last and at one stroke, makes a checkpoint step valid.
It holds the SHA-256 of every file and the checksum of every array, and a digest of itself."""

import concurrent.futures
import json
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from llm.training.files import (
    absolute,
    append_json_line,
    canonical_json,
    file_digest,
    fsync,
    read_json_lines,
    text_digest,
    write_atomically,
)
from llm.training.manifest_content import find_problem
from llm.training.step_directories import step_numbers

CHECKPOINTS = "checkpoints"  # in the workdir: one directory a step
LEDGER = "checkpoints.jsonl"  # in the workdir: one line for each step that was ever valid
MANIFEST = "MANIFEST.json"
_LEDGER_FIELDS = (
    "step", "tokens", "params_digest", "state_digest", "config_digest", "cursor", "time"
)  # fmt: skip
_PARTS_TIMEOUT_SECONDS = 600.0
_READERS = 4  # hashlib lets other threads run; more readers than this no disk rewards


class CorruptStepError(RuntimeError):
    """A checkpoint step is not what was written."""


def list_steps(workdir: epath.PathLike) -> list[int]:
    """Return the steps of a workdir that have a manifest, in order."""
    directory = absolute(workdir) / CHECKPOINTS
    return [step for step in step_numbers(directory) if (directory / str(step) / MANIFEST).exists()]


def read_ledger(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Return a row for each checkpoint that was ever valid, deleted ones included."""
    rows = read_json_lines(absolute(workdir) / LEDGER)
    return [row for row in rows if isinstance(row.get("step"), int)]


def once_valid(workdir: epath.PathLike) -> set[int]:
    """Return the steps that the ledger names and that no run has discarded since."""
    valid: set[int] = set()
    for row in read_json_lines(absolute(workdir) / LEDGER):
        if isinstance(row.get("step"), int):
            valid.add(row["step"])
        valid.discard(row.get("discarded"))
    return valid


def note_discarded(workdir: epath.PathLike, step: int) -> None:
    """Note in the ledger that a step is deleted because a run has gone back to before it."""
    append_json_line(absolute(workdir) / LEDGER, {"discarded": step, "time": time.time()})


def ledger_row(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what the ledger keeps of a manifest."""
    return {field: manifest.get(field) for field in _LEDGER_FIELDS}


def step_files(step_dir: epath.Path) -> list[str]:
    """Return the files below a step's directory, relative and sorted, manifests left out."""
    found, pending = [], [step_dir]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            elif not path.name.lstrip(".").startswith(MANIFEST):
                found.append(path.relative_to(step_dir).as_posix())
    return sorted(found)


def hash_files(step_dir: epath.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bring files of a committed step to the disk and return their SHA-256 and sizes."""
    hashed = {}
    for name in names:
        fsync(step_dir / name)
        sha256, size = file_digest(step_dir / name)
        hashed[name] = {"sha256": sha256, "bytes": size}
    return hashed


def gather_hashes(
    step_dir: epath.Path,
    hashed: dict[str, dict[str, Any]],
    *,
    process_index: int,
    num_processes: int,
) -> dict[str, dict[str, Any]]:
    """Return, on the first process, what all have hashed; each other one hands its share over.

    To be called when the share's files are in place.

    Raises:
      TimeoutError: another process did not finish its share.
      RuntimeError: two processes have hashed, and written, the same file.
    """
    if process_index:
        write_atomically(step_dir / f"{MANIFEST}.part-{process_index}", canonical_json(hashed))
        return hashed
    deadline = time.monotonic() + _PARTS_TIMEOUT_SECONDS
    for other in range(1, num_processes):
        part = step_dir / f"{MANIFEST}.part-{other}"
        pause = 0.05
        while not part.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {other} did not hash its files of {step_dir} within "
                    f"{_PARTS_TIMEOUT_SECONDS:.0f} s; see that process's log"
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)  # a store answers slowly, and counts the questions
        share = json.loads(part.read_text())
        if doubled := sorted(hashed.keys() & share.keys()):
            raise RuntimeError(f"{step_dir}: two processes wrote {shorten(doubled)}")
        hashed = hashed | share
        part.unlink()
    return hashed


def write_manifest(step_dir: epath.Path, content: dict[str, Any]) -> None:
    """Make a step valid: put its manifest in place, whole or not at all."""
    write_atomically(step_dir / MANIFEST, _to_text(content))


def read_manifest(step_dir: epath.Path) -> dict[str, Any]:
    """Return a step's manifest.

    Raises:
      CorruptStepError: it is missing, or any bit of it is not as written.
    """
    path = step_dir / MANIFEST
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise CorruptStepError(f"{MANIFEST} is missing") from None
    except ValueError as error:
        raise CorruptStepError(f"{MANIFEST} is not text: {error}") from None
    try:
        content = json.loads(text)["manifest"]
        intact = _to_text(content) == text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptStepError(f"{MANIFEST} cannot be parsed: {error!r}") from None
    if not intact:
        raise CorruptStepError(f"{MANIFEST} differs from its own digest")
    problem = find_problem(content)
    if problem:  # whoever wrote it could write its digest
        raise CorruptStepError(f"{MANIFEST} is not one of ours: {problem}")
    return content


def _to_text(content: dict[str, Any]) -> str:
    # One canonical text a content, so that a flipped bit anywhere, even in a space, shows.
    return canonical_json({"manifest": content, "sha256": text_digest(canonical_json(content))})


def check_files(
    step_dir: epath.Path, manifest: dict[str, Any], names: Sequence[str] | None = None
) -> list[str]:
    """Return what is wrong with a step's files (some of them, by name), a sentence each."""

    def check(name: str) -> str | None:
        expected = manifest["files"][name]
        try:
            sha256, size = file_digest(step_dir / name)
        except FileNotFoundError:
            return f"file {name} is missing"
        except OSError as error:
            return f"file {name} cannot be read: {error}"
        if size != expected["bytes"]:
            return f"file {name} has {size} bytes, not {expected['bytes']}"
        if sha256 != expected["sha256"]:
            return f"file {name} has other bytes than were written (SHA-256 {sha256[:12]}…)"
        return None

    names = sorted(manifest["files"]) if names is None else names
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return [problem for problem in readers.map(check, names) if problem]


def check_arrays(manifest: dict[str, Any], digests: dict[str, str]) -> list[str]:
    """Return which arrays do not have the checksum that the manifest gives, a sentence each."""
    return [
        f"array {name} has checksum {digest}, not {manifest['arrays'][name]['digest']}"
        for name, digest in digests.items()
        if digest != manifest["arrays"][name]["digest"]
    ]


def shorten(items: Sequence[str], limit: int = 4) -> str:
    """Return the first few items in one line, and how many more there are."""
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
