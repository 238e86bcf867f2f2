"""Writes metrics: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for.
On a resume the logs are cut where the restored step's were, so that no line is lost or doubled."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from llm.training.files import absolute, open_to_append, read_json_lines, write_atomically
from llm.training.tensorboard import EventLog

METRICS = "metrics.jsonl"
TEXTS = "texts.jsonl"
TENSORBOARD = "tensorboard"
_WANDB_ID = "wandb_id.txt"

log = logging.getLogger(__name__)


class LogError(RuntimeError):
    """A log of the run cannot be written."""


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
    return [decode_row(row) for row in read_json_lines(absolute(workdir) / METRICS)]


def decode_row(row: Mapping[str, Any]) -> dict[str, float | int]:
    """Return a line of metrics.jsonl as it was written: not-finite values are floats again."""
    return {name: float(x) if isinstance(x, str) else x for name, x in row.items()}


class JsonLog:
    """A file of JSON lines, each with its step, in order."""

    def __init__(self, path: epath.Path, guard: Callable[[], None]):
        self._path, self._guard = path, guard
        self._file: Any = None

    def open(self, step: int, size_bytes: int | None) -> None:
        """Open for writing, cut to what was written up to a step.

        `size_bytes` is the file's size when that step's checkpoint was made, if it is known.
        """

        def keep(content: bytes) -> bytes:
            return b"".join(
                line + b"\n"
                for line in content[:size_bytes].split(b"\n")[:-1]  # the last is torn, or empty
                if _step_of(line) <= step
            )

        self._file = open_to_append(self._path, keep, self._guard)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line: to a file at once, so that a killed process loses none that it has written.

        Raises:
          OSError: the disk is full, perhaps. The line is kept and written with the next one.
        """
        row = {"step": step} | {name: encode(value) for name, value in values.items()}
        self._file.append(json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n")

    def sync(self) -> int:
        """Bring the lines to the disk itself, or the store, and return their size in bytes."""
        return self._file.sync()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise LogError(f"{self._path} lacks its last lines: {error}") from error


def _step_of(line: bytes) -> float | int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a damaged line has no place in the log


class MetricsWriter:
    """Writes numbers and texts by name and step. Only the first process of a run has one.

    With `patient` a log that cannot be written is a warning: lines wait in memory for a disk with
    room. TensorBoard's events do not wait; they go on at the next start. `guard` raises where this
    process has lost the workdir, and is called before a log is put on an object store.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        wandb_project: str = "",
        patient: bool = False,
        guard: Callable[[], None] = lambda: None,
    ):
        self._workdir, self._patient = absolute(workdir), patient
        self._logs = {name: JsonLog(self._workdir / name, guard) for name in (METRICS, TEXTS)}
        self._wandb_project = wandb_project
        self._waiting = False  # lines, for a disk with room
        self._tensorboard = None
        self._wandb = None

    def open(self, step: int, sizes_bytes: Mapping[str, int] | None, config: Any = None) -> None:
        """Open all logs to go on after a step, with the sizes that `sync` gave at that step.

        None begins the logs anew: there is no checkpoint, so what they hold will come again.
        """
        for name, json_log in self._logs.items():
            json_log.open(step, 0 if sizes_bytes is None else sizes_bytes.get(name))
        self._tensorboard = EventLog(self._workdir / TENSORBOARD, step)
        if self._wandb_project:
            self._wandb = _start_wandb(self._workdir, self._wandb_project, config)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of numbers.

        Raises:
          LogError: it cannot be written, and the writer is not patient.
        """
        numbers = {name: to_float(name, value) for name, value in values.items()}
        self._attempt(lambda: self._logs[METRICS].write(step, numbers))
        self._to_tensorboard(lambda log: log.write(step, numbers))
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write one line of texts, such as samples, to texts.jsonl and TensorBoard."""
        self._attempt(lambda: self._logs[TEXTS].write(step, texts))
        self._to_tensorboard(lambda log: log.write_texts(step, texts))

    def sync(self) -> dict[str, int]:
        """Bring everything written to the disk; return the size of each log in bytes.

        Raises:
          LogError: something cannot be written.
        """
        self._to_tensorboard(lambda log: log.flush())
        try:
            return {name: json_log.sync() for name, json_log in self._logs.items()}
        except OSError as error:
            raise LogError(f"a log in {self._workdir} cannot be written: {error}") from error

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        with contextlib.ExitStack() as stack:
            for json_log in self._logs.values():
                stack.callback(json_log.close)
            if self._tensorboard is not None:
                self._to_tensorboard(lambda log: log.close())
                self._tensorboard = None
            if self._wandb is not None:
                self._wandb.finish()
                self._wandb = None

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._waiting = False
        except OSError as error:
            text = f"a log in {self._workdir} cannot be written: {error}"
            if not self._patient:
                raise LogError(text) from error
            if not self._waiting:  # once, until a line can be written again
                log.warning("%s; its lines wait for room", text)
            self._waiting = True

    def _to_tensorboard(self, write: Callable[[EventLog], None]) -> None:
        if self._tensorboard is None:
            return
        try:
            write(self._tensorboard)
        except OSError as error:
            log.warning("TensorBoard's events stop until the next start: %s", error)
            self._tensorboard = None


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
