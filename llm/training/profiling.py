"""A window of steps recorded with jax.profiler into workdir/profile, for TensorBoard or Perfetto.
Off the window it costs a comparison of two integers a step."""

import os
from typing import Any

import jax
from etils import epath


class ProfileWindow:
    """Traces steps `start_step` … `start_step + num_steps - 1`, once."""

    def __init__(self, directory: epath.Path, start_step: int, num_steps: int):
        self._directory = directory
        self._first, self._last = start_step, start_step + num_steps - 1
        self._active = False

    def after_step(self, step: int, outputs: Any) -> bool:
        """Start before the window's first step, stop after its last; True when a trace was written.

        Waits for the devices at both ends: the trace should hold these steps and no others.
        """
        if step + 1 == self._first and self._first <= self._last:
            jax.block_until_ready(outputs)
            jax.profiler.start_trace(os.fspath(self._directory))
            self._active = True
        elif step == self._last and self._active:
            jax.block_until_ready(outputs)
            self.close()
            return True
        return False

    def close(self) -> None:
        """Write what was traced so far."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
