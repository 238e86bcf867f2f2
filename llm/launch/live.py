"""The table of jobs that a person watches: live on a terminal, a line a change elsewhere."""

import sys
import time
from collections.abc import Sequence

import rich.console
import rich.live
import rich.table

from llm.launch.jobs import Job, last_metrics
from llm.training.progress import describe

_REFRESH_SECONDS = 1.0


class LiveTable:
    """Shows how jobs stand, with their loss and one more metric, for use in a `with` statement."""

    def __init__(self, jobs: Sequence[Job], metric: str = "", stream=None):
        self._console = rich.console.Console(file=stream or sys.stderr, highlight=False)
        self._states = dict.fromkeys((job.name for job in jobs), "waits")
        self._folders = {job.name: job.folder for job in jobs}
        self._metric = metric
        self._live: rich.live.Live | None = None
        self._shown = float("-inf")

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def set(self, name: str, state: str) -> None:
        """Note a job's new state."""
        self._states[name] = state
        if self._live is None:
            over = sum(
                not state.startswith(("waits", "runs")) and not state.endswith("starts again")
                for state in self._states.values()
            )
            self.say(f"[{over}/{len(self._states)}] {name}: {state}{self._figures(name)}")
        self._shown = float("-inf")

    def say(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the jobs' newest figures, now and then."""
        if self._live is not None and time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> rich.table.Table:
        table = rich.table.Table("member", "state", "figures", box=None)
        for name, state in self._states.items():
            table.add_row(name, state, self._figures(name).lstrip(" ,"))
        return table

    def _figures(self, name: str) -> str:
        last = last_metrics(self._folders[name])
        if "step" not in last:
            return ""
        figures = [f", step {last['step']}"]
        if loss := describe(last.get("train/loss"), 0, None, None, None):
            figures.append(loss)
        if self._metric != "train/loss" and last.get(self._metric) is not None:
            figures.append(f"{self._metric} {last[self._metric]:.4g}")
        return ", ".join(figures)
