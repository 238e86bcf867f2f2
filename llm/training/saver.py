"""When a run saves, and what makes a save whole: its logs, and the body of its step."""

import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from llm.training.checkpoints import Checkpointer, CheckpointError, Restored
from llm.training.manifests import list_steps
from llm.training.metrics import LogError, MetricsWriter
from llm.training.run_config import RunConfig


class Saver:
    """Saves steps as a run's config says, and knows which one was saved last.

    A step that is being saved becomes valid when the loop's body for it is over (`commit`), so that
    an evaluation due at that step is in the logs that the checkpoint belongs to, or is done again.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        run_config: RunConfig,
        metrics: MetricsWriter | None,
        total_steps: int,
        say: Callable[[str], None],
        guard: Callable[[], None],
    ):
        """`metrics` is None on all processes but the first; `say` prints a line; `guard` raises
        where the workdir is another run's by now."""
        self._run_config, self._total_steps = run_config, total_steps
        self._metrics, self._say = metrics, say
        self._saved_sizes: dict[str, int] = {}  # of the logs, when it was saved
        self._last_time = time.monotonic()
        self.saved_step = -1
        self.checkpointer = Checkpointer(
            workdir,
            keep_newest=run_config.keep_newest_checkpoints,
            keep_every_steps=run_config.keep_every_steps,
            # Where saves are by the clock, none is more regular than another.
            regular_steps=1 if run_config.save_every_seconds else run_config.save_every_steps or 1,
            guard=guard,
        )

    def go_on_from(self, step: int) -> None:
        """Begin at a step that is saved; -1: nothing is."""
        self.saved_step, self._saved_sizes = step, {}
        self._last_time = time.monotonic()

    def go_back(self, step: int, state: Any, at_most: int) -> Restored | None:
        """Return the newest good step not above `at_most`; None where none so old is saved.

        Else the memory of the state given, which it replaces, is free: two of them may not fit.
        """
        self.commit(step, body_done=False)
        # A save that failed in the background was of a step that is left behind.
        self.tolerate(step, self.checkpointer.wait)
        self.checkpointer.settle()
        if not any(step <= at_most for step in list_steps(self.checkpointer.workdir)):
            return None
        for leaf in jax.tree.leaves(state):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        return self.checkpointer.restore(state, at_most=at_most)

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be saved: the last one always is."""
        run_config = self._run_config
        if step >= self._total_steps:
            return True
        if run_config.save_every_steps and step % run_config.save_every_steps == 0:
            return True
        seconds = run_config.save_every_seconds
        return seconds is not None and time.monotonic() - self._last_time >= seconds

    def tolerate(self, step: int, save: Callable[[], None]) -> None:
        """Save or look after a save; where it failed and more steps follow, go on if so asked."""
        try:
            save()
        except (CheckpointError, LogError) as error:
            if not self._run_config.go_on_after_failed_save or step >= self._total_steps:
                raise
            self._last_time = time.monotonic()
            self._say(f"NOT SAVED: {error} Training goes on (run.go_on_after_failed_save).")

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Start saving a step."""
        self._saved_sizes = {} if self._metrics is None else self._metrics.sync()
        self.checkpointer.save(step, state, notes, hold=True)
        self.saved_step = step
        self._last_time = time.monotonic()

    def commit(self, step: int, *, body_done: bool) -> None:
        """Let the step saved last become valid, with the logs as long as they are to be kept."""
        if body_done and self.saved_step == step and self._saved_sizes:
            try:
                self._saved_sizes = self._metrics.sync()
            except LogError:
                if not self._run_config.go_on_after_failed_save:
                    raise
                body_done = False  # a run that goes on from this step will do it again
        self.checkpointer.commit({"body_done": body_done, "log_bytes": self._saved_sizes})
