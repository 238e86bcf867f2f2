"""A window of steps recorded with jax.profiler into workdir/profile, for TensorBoard or Perfetto.
Off the window it costs a comparison of two integers a step."""

import contextlib
import os
from typing import Any

import jax
from etils import epath

from llm.training.files import local_directory


class ProfileWindow:
    """Traces `num_steps` steps from the `start_step`-th on that this process does, once."""

    def __init__(self, directory: epath.Path, start_step: int, num_steps: int):
        self._directory, self._start_step, self._num_steps = directory, start_step, num_steps
        self._first, self._last = 0, -1
        self._active: contextlib.ExitStack | None = None

    def open(self, step: int, total_steps: int) -> None:
        """Place the window, counted from the step that the run goes on from.

        A run with fewer steps left is traced at its end: a trace asked for is a trace written.
        """
        if self._num_steps and step < total_steps:
            latest = max(step + 1, total_steps - self._num_steps + 1)
            self._first = min(step + self._start_step, latest)
            self._last = min(self._first + self._num_steps - 1, total_steps)
            self.after_step(step, None)

    def after_step(self, step: int, outputs: Any) -> bool:
        """Start before the window's first step, stop after its last; True when a trace was written.

        Waits for the devices at both ends: the trace should hold these steps and no others.
        """
        if step + 1 == self._first and self._first <= self._last and not self._active:
            jax.block_until_ready(outputs)
            self._active = contextlib.ExitStack()
            folder = self._active.enter_context(local_directory(self._directory))
            jax.profiler.start_trace(os.fspath(folder))
        elif step == self._last and self._active is not None:
            jax.block_until_ready(outputs)
            self.close()
            return True
        return False

    def close(self) -> None:
        """Write what was traced so far."""
        if self._active is not None:
            active, self._active = self._active, None
            with active:
                jax.profiler.stop_trace()
