"""Writes metrics: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for.
On a resume the logs are cut where the restored step's were, so that no line is lost or doubled."""

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from llm.training.files import fsync, read_json_lines, write_atomically

METRICS = "metrics.jsonl"
TEXTS = "texts.jsonl"
TENSORBOARD = "tensorboard"
_WANDB_ID = "wandb_id.txt"


def to_float(name: str, value: Any) -> float | int:
    """Return a scalar metric as the Python number with the shortest digits that give it back.

    Raises:
      ValueError: the value is not one number.
    """
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iufb" and array.dtype.name != "bfloat16":
        raise ValueError(
            f"metric {name} has shape {array.shape} and dtype {array.dtype}; give one number"
        )
    scalar = array.reshape(())
    if array.dtype.kind in "iub":
        return int(scalar)
    if array.dtype.itemsize < 8:
        # 2.345 rather than 2.3450000286102295: the same float32 when read back.
        return float(str(scalar.astype(np.float32)[()]))
    return float(scalar)


def encode(value: float | int | str) -> float | int | str:
    """Return a value that strict JSON can hold: "NaN", "Infinity" and "-Infinity" are strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float | int]]:
    """Return the lines of a workdir's metrics.jsonl; not-finite values are floats again."""
    rows = read_json_lines(epath.Path(workdir) / METRICS)
    return [
        {name: float(x) if isinstance(x, str) else x for name, x in row.items()} for row in rows
    ]


class JsonLog:
    """A file of JSON lines, each with its step, in order."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._stream = None

    def open(self, step: int, size_bytes: int | None) -> None:
        """Open for writing, cut to what was written up to a step.

        `size_bytes` is the file's size when that step's checkpoint was made, if it is known.
        """
        if self._path.exists():
            content = self._path.read_bytes()
            kept = b"".join(
                line + b"\n"
                for line in content[:size_bytes].split(b"\n")[:-1]  # the last is torn, or empty
                if _step_of(line) <= step
            )
            if kept != content:
                write_atomically(self._path, kept.decode())
        self._stream = self._path.open("ab")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line, at once: a killed process loses none that it has written."""
        row = {"step": step} | {name: encode(value) for name, value in values.items()}
        line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        self._stream.write(line.encode())
        self._stream.flush()

    def sync(self) -> int:
        """Bring the lines to the disk itself and return the file's size in bytes."""
        fsync(self._path)
        return self._stream.tell()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._stream is not None:
            self._stream.close()


def _step_of(line: bytes) -> float | int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a damaged line has no place in the log


class MetricsWriter:
    """Writes numbers and texts by name and step. Only the first process of a run has one."""

    def __init__(self, workdir: epath.PathLike, *, wandb_project: str = ""):
        self._workdir = epath.Path(workdir)
        self._logs = {name: JsonLog(self._workdir / name) for name in (METRICS, TEXTS)}
        self._wandb_project = wandb_project
        self._tensorboard = None
        self._wandb = None

    def open(self, step: int, sizes_bytes: Mapping[str, int] | None, config: Any = None) -> None:
        """Open all logs to go on after a step, with the sizes that `sync` gave at that step.

        None begins the logs anew: there is no checkpoint, so what they hold will come again.
        """
        from tensorboardX import SummaryWriter  # slow to import, and only runs need it

        for name, json_log in self._logs.items():
            json_log.open(step, 0 if sizes_bytes is None else sizes_bytes.get(name))
        directory = self._workdir / TENSORBOARD
        # TensorBoard hides what an earlier process wrote at this step or later.
        purge_step = step + 1 if directory.exists() else None
        # The library names its files by the second: a quick restart would overwrite the last one.
        suffix = f".{time.time_ns()}"
        self._tensorboard = SummaryWriter(
            os.fspath(directory), purge_step=purge_step, filename_suffix=suffix
        )
        if self._wandb_project:
            self._wandb = _start_wandb(self._workdir, self._wandb_project, config)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of numbers."""
        numbers = {name: to_float(name, value) for name, value in values.items()}
        self._logs[METRICS].write(step, numbers)
        for name, number in numbers.items():
            self._tensorboard.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write one line of texts, such as samples, to texts.jsonl and TensorBoard."""
        self._logs[TEXTS].write(step, texts)
        for name, text in texts.items():
            self._tensorboard.add_text(name, text, step)

    def sync(self) -> dict[str, int]:
        """Bring everything written to the disk; return the size of each log in bytes."""
        return {name: json_log.sync() for name, json_log in self._logs.items()}

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        for json_log in self._logs.values():
            json_log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _start_wandb(workdir: epath.Path, project: str, config: Any):
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f'run.wandb_project="{project}" needs the package wandb: pip install -e ".[wandb]"'
        ) from error
    path = workdir / _WANDB_ID
    if not path.exists():
        write_atomically(path, os.urandom(8).hex())
    return wandb.init(
        project=project, id=path.read_text(), resume="allow", name=workdir.name, config=config
    )
