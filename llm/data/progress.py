"""What a person sees while data are prepared: a bar on a terminal, a plain line now and then
elsewhere. Written to standard error, since standard output belongs to the experiment."""

import sys
import time
from typing import TextIO

import rich.console
import rich.progress

_PLAIN_INTERVAL_SECONDS = 10.0


class PrepareProgress:
    """Counts finished shards and what is in them."""

    def __init__(self, num_shards: int, stream: TextIO | None = None):
        self._console = rich.console.Console(file=stream or sys.stderr, highlight=False)
        self._num_shards = num_shards
        self._done, self._tokens, self._bytes = 0, 0, 0
        self._started = self._last_shown = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> "PrepareProgress":
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("tokenising"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._describe(), total=self._num_shards)
            self._bar.start()
        return self

    def __exit__(self, exc_type, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif exc_type is None and self._num_shards:
            self._say()

    def advance(self, marker: dict) -> None:
        """Count a finished shard, given its marker."""
        self._done += 1
        self._tokens += marker["tokens"]
        self._bytes += marker["bytes"]
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._describe())
        elif time.monotonic() - self._last_shown > _PLAIN_INTERVAL_SECONDS:
            self._say()

    def _say(self) -> None:
        self._last_shown = time.monotonic()
        seconds = self._last_shown - self._started
        text = f"tokenising: {self._describe()}, {seconds:.0f} s"
        self._console.print(text, markup=False, soft_wrap=True)

    def _describe(self) -> str:
        return (
            f"{self._done}/{self._num_shards} shards, {self._bytes / 1e6:.1f} MB of text, "
            f"{self._tokens / 1e6:.2f}M tokens"
        )
