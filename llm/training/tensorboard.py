"""TensorBoard's event files, written by the thread that logs. Second floor.

The library's own writer hands events to a thread that dies on a full disk, after which the next
events wait for it for ever; its pieces are used here without that thread.
"""

import os
import socket
import time
from collections.abc import Mapping

from etils import epath

_FLUSH_SECONDS = 30.0


class EventLog:
    """Numbers and texts by name and step. A log that cannot be written any more raises OSError."""

    def __init__(self, directory: epath.Path, step: int):
        """Begin a file that goes on after a step: what others hold beyond it is hidden."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboardX.record_writer import RecordWriter

        again = directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        # Nanoseconds: a quick restart must not overwrite the last file.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._event, self._flushed = Event, time.monotonic()
        self._file = RecordWriter(os.fspath(directory / name))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if again:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Add numbers, all of them in one event."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        self._add(step, Summary(value=values))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Add texts, each of them in an event of its own."""
        from tensorboardX.summary import text

        for name, content in texts.items():
            self._add(step, text(name, content))

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._flushed = time.monotonic()
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        self._file.close()

    def _add(self, step: int, summary) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, event) -> None:
        self._file.write(event.SerializeToString())
