"""TensorBoard's event files, written by the thread that logs. Second floor.

The library's own writer hands events to a thread that dies on a full disk, after which the next
events wait for it for ever; its pieces are used here without that thread.
"""

import os
import socket
import tempfile
import time
from collections.abc import Mapping

from etils import epath

from llm.training.files import is_local

_FLUSH_SECONDS = 30.0
_FILE_BYTES = 1 << 20  # on a store, where a file is put anew with every flush


class EventLog:
    """Numbers and texts by name and step. A log that cannot be written any more raises OSError."""

    def __init__(self, directory: epath.Path, step: int):
        """Begin a file that goes on after a step: what others hold beyond it is hidden."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # slow to import

        again = directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._flushed = Event, time.monotonic()
        self._directory, self._staging = directory, None
        if not is_local(directory):
            self._staging = tempfile.TemporaryDirectory(prefix="events_")
        self._begin_file()
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
        """Bring what was written to the disk, or the store."""
        self._flushed = time.monotonic()
        self._file.flush()
        if self._staging is not None:
            written = epath.Path(self._file.path)
            (self._directory / written.name).write_bytes(written.read_bytes())
            if written.stat().length > _FILE_BYTES:  # not ever more to put
                self._file.close()
                written.unlink()
                self._begin_file()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()
            if self._staging is not None:
                self._staging.cleanup()

    def _begin_file(self) -> None:
        from tensorboardX.record_writer import RecordWriter

        # Nanoseconds: a quick restart must not overwrite the last file.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        folder = self._directory if self._staging is None else epath.Path(self._staging.name)
        self._file = RecordWriter(os.fspath(folder / name))
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def _add(self, step: int, summary) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, event) -> None:
        self._file.write(event.SerializeToString())
