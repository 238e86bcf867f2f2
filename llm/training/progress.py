"""The line a person watches: loss, tokens a second, MFU, time left. Written to standard error.
Live on a terminal, a plain line now and then elsewhere; never touches a device."""

import sys
import time

import rich.console
import rich.progress

_PLAIN_INTERVAL_SECONDS = 10.0


class Throughput:
    """Seconds of the steps that count: those during which nothing but training happened."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds, self._steps = 0.0, 0
        self.seconds_per_step: float | None = None  # over the last interval

    def tick(self) -> None:
        """Count the time since the last tick as one step."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._steps += 1
        self._last = now

    def skip(self) -> None:
        """Leave the step under way out: it holds an evaluation, a save or a compilation."""
        self._last = None

    def end_interval(self) -> float | None:
        """Return the mean seconds of a step since the last call; None where none counted."""
        if not self._steps:
            return None
        self.seconds_per_step = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        return self.seconds_per_step


class Progress:
    """Shows a run's state. `update` is cheap enough to call at every step."""

    def __init__(self, total_steps: int, *, stream=None, interval_seconds=_PLAIN_INTERVAL_SECONDS):
        self._console = rich.console.Console(file=stream or sys.stderr, highlight=False)
        self._total_steps = total_steps
        self._interval_seconds = interval_seconds
        self._last_shown = float("-inf")
        self._bar: rich.progress.Progress | None = None

    def start(self, step: int) -> None:
        """Show the line, from a step on."""
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.description}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=self._total_steps, completed=step)
            self._bar.start()

    def update(
        self,
        step: int,
        loss: float | None,
        *,
        seconds_per_step: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Show a step. On a terminal at once; elsewhere every few seconds and at the end."""
        text = describe(loss, self._total_steps - step, seconds_per_step, tokens_per_second, mfu)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if now - self._last_shown >= self._interval_seconds or step == self._total_steps:
            self._last_shown = now
            self.say(f"step {step}/{self._total_steps}  {text}")

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the live line down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(
    loss: float | None,
    steps_left: int,
    seconds_per_step: float | None,
    tokens_per_second: float | None,
    mfu: float | None,
) -> str:
    """Return the figures in words: "loss 3.214  18.3k tokens/s  MFU 41.2%  0:12:05 left"."""
    parts = [] if loss is None else [f"loss {loss:.4g}"]
    if seconds_per_step:
        parts += [f"{_short(tokens_per_second)} tokens/s"] if tokens_per_second else []
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        minutes, seconds = divmod(round(steps_left * seconds_per_step), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return "  ".join(parts)


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
