"""Watches for SIGTERM (how a TPU VM or a scheduler announces its end) and Ctrl-C.
A signal only raises a flag: Run saves the exact step and leaves, with code 75, between steps."""

import os
import signal
import threading
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: run the same command again and it goes on.
EXIT_CODE = 75


class Preemption:
    """A flag that SIGTERM and SIGINT raise between `start` and `stop`.

    Until `armed` is set there is no progress to save, and a signal ends the process at once.
    """

    def __init__(self) -> None:
        self.armed = False
        self.signal_name = ""
        self._old_handlers: dict[int, Any] = {}
        self._ask_all = False
        self._asked = 0

    def start(self, num_processes: int = 1) -> None:
        """Install the handlers; with several processes SIGTERM is left to JAX's own service.

        Several processes must agree on one step to save. `jax.distributed` has a service for that
        which listens to SIGTERM itself, and a handler here would take the signal away from it.
        Ctrl-C is passed on to it as a SIGTERM.
        """
        self._ask_all = num_processes > 1
        if threading.current_thread() is not threading.main_thread():
            return  # Python runs handlers in the main thread only
        handlers = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
        if self._ask_all:
            handlers = {signal.SIGINT: self._pass_on}
        for number, handler in handlers.items():
            self._old_handlers[number] = signal.signal(number, handler)

    def stop(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()

    def requested(self) -> bool:
        """Return whether to save and leave after this step; several processes all agree."""
        self._asked += 1
        if self._ask_all:
            from jax.experimental import multihost_utils

            # It takes a number that only grows, the same everywhere: a run's steps can go back.
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.signal_name = self.signal_name or "SIGTERM"
                return True
            return False
        return bool(self.signal_name)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        first, self.signal_name = not self.signal_name, signal.Signals(number).name
        if first:
            _say(f"{self.signal_name}: all processes save after the same step, then leave")
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            _say(f"{self.signal_name}: already asked for; please wait")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.signal_name = not self.signal_name, signal.Signals(number).name
        if not self.armed:
            _say(f"{self.signal_name}: nothing to save yet; leaving (exit code {EXIT_CODE})")
            raise SystemExit(EXIT_CODE)
        if first:
            _say(f"{self.signal_name}: saving at the end of this step, then leaving")
        else:
            _say(f"{self.signal_name}: already saving; please wait")


def _say(text: str) -> None:
    # os.write: a handler may run in the middle of a print, and buffered streams do not nest.
    os.write(2, f"\n{text}\n".encode())
