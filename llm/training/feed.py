"""A run's batches on their way into its loop: waits are timed, and batches to skip are skipped.
Second floor."""

from collections.abc import Callable, Iterator
from typing import Any

from llm.training.goodput import Goodput
from llm.training.spikes import SpikeWatch


class Feed(Iterator):
    """An iterator over another one's batches, which it is in all else."""

    def __init__(self, batches: Any, step: Callable[[], int], goodput: Goodput, spikes: SpikeWatch):
        """`step` tells how many steps are done; `batches` may have `seek(cursor)`."""
        self._batches, self._step = batches, step
        self._goodput, self._spikes = goodput, spikes
        self.sequences: tuple[int, int] | None = None  # of the last batch: from … up to
        self._cursor = 0

    def __next__(self) -> Any:
        step = self._step()
        with self._goodput.during("stall"):
            cursor = self._spikes.jump(step)
            if cursor is not None:
                self.seek(cursor)
            batch = next(self._batches)
        if isinstance(batch, dict) and "cursor" in batch:
            begin, self._cursor = self._cursor, int(batch["cursor"])
            self.sequences = (begin, self._cursor)
        self._goodput.enter_step(step + 1)
        return batch

    def seek(self, cursor: int) -> None:
        """Go on after so many sequences of the global order."""
        self._batches.seek(cursor)
        self._cursor = cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
