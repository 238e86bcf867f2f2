"""What an exported directory is: the run and step that it was made from, and every file's hash.
Interop floor. A directory that got the weights of another step, or a damaged file, is refused."""

import pathlib
from collections.abc import Mapping
from typing import Any

from llm.data.disk import file_facts, read_json_object, write_json

LEDGER = "ledger.json"


def write_ledger(directory: pathlib.Path, origin: Mapping[str, Any]) -> None:
    """Write ledger.json: origin, and size and SHA-256 of every file that is there."""
    files = {path.name: file_facts(path) for path in sorted(directory.iterdir())}
    write_json(directory / LEDGER, {"format": 1, "origin": dict(origin), "files": files})


def read_ledger(directory: pathlib.Path) -> dict[str, Any] | None:
    """Return what ledger.json says, or None where there is none.

    Raises:
      ValueError: it cannot be read.
    """
    path = directory / LEDGER
    if not path.is_file():
        return None
    ledger = read_json_object(path)
    if not all(isinstance(ledger.get(part), dict) for part in ("files", "origin")):
        raise ValueError(f"{path} is damaged: files and origin must be objects")
    names = list(ledger["files"])
    strange = [name for name in names if pathlib.PurePath(name).name != name]
    if strange:
        raise ValueError(f"{path} names a file outside its directory: {strange[0]}")
    return ledger


def export_problems(directory: pathlib.Path, pattern: str = "*") -> list[str]:
    """Return what differs from the ledger of a directory that has one, a sentence each.

    Looked at are the files whose names match the pattern.
    """
    ledger = read_ledger(directory)
    if ledger is None:
        return []
    origin, problems = ledger["origin"], []
    for name, facts in ledger["files"].items():
        path = directory / name
        if not path.match(pattern):
            continue
        if not path.is_file():
            problems.append(f"{path} is missing: {LEDGER} names it")
        elif file_facts(path) != facts:
            problems.append(
                f"{path} is not the file that was exported here (step {origin.get('step')}, "
                f"parameters {origin.get('params_digest')}): export again, or remove {LEDGER} if "
                "you changed the file yourself"
            )
    return problems


def check_ledger(directory: pathlib.Path) -> None:
    """Hold the weights of an exported directory against its ledger, if it has one.

    Raises:
      ValueError: a file is missing or another one than was exported.
    """
    problems = export_problems(directory, "*.safetensors")
    if problems:
        raise ValueError(problems[0])
