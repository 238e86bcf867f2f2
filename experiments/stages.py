"""A job of several stages in one directory: each runs once, is timed, and is found done later."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from experiments.entry import plain
from llm.data.disk import read_json_object
from llm.training.files import write_atomically
from llm.training.goodput import start_stage
from llm.training.run_config import check_config, record_config

_FILE = "stages.json"


def open_job(workdir: epath.PathLike, config: Any, *, allow_change: bool) -> "Stages":
    """Return the stages of a job in its directory, whose config is checked or recorded.

    Raises:
      ConfigChangedError: the directory holds a job of another config, and no change is allowed.
    """
    workdir, fields = epath.Path(workdir), dataclasses.asdict(config)
    changes = check_config(workdir, fields, allow_change=allow_change)
    workdir.mkdir(parents=True, exist_ok=True)
    record_config(workdir, fields, changes)
    return Stages(workdir)


class Stages:
    """The record of a job's stages: results (JSON values) and wall seconds, over all its starts."""

    def __init__(self, workdir: epath.PathLike, say: Callable[[str], None] = print):
        self._file, self._say = epath.Path(workdir) / _FILE, say
        self._record: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self._record = read_json_object(self._file)
            entries = self._record.values()
            if not all(isinstance(e, dict) and type(e.get("seconds")) is float for e in entries):
                raise ValueError(f"{self._file} is damaged; remove it to run all stages again")

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        """Return the stage's result: what it returned before, or what it returns now.

        The time of a start that is cut short counts; a stage goes on by its own means.
        """
        entry = self._record.setdefault(name, {"seconds": 0.0})
        if "result" in entry:
            self._say(f"{name}: done before, in {entry['seconds']:.0f} s")
            return entry["result"]
        self._say(f"{name} …")
        start_stage()
        with self._timed(entry):
            result = plain(stage())
            entry["result"] = result
        self._say(f"{name}: {entry['seconds']:.0f} s")
        return result

    @property
    def wall_seconds(self) -> dict[str, float]:
        """Wall seconds of each stage so far, and their total."""
        seconds = {name: round(entry["seconds"], 1) for name, entry in self._record.items()}
        return seconds | {"total": round(sum(seconds.values()), 1)}

    @contextlib.contextmanager
    def _timed(self, entry: dict[str, Any]):
        before, start = entry["seconds"], time.monotonic()
        try:
            yield
        finally:
            entry["seconds"] = before + time.monotonic() - start
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(self._record, indent=1))
