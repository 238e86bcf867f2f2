"""The metrics of steps, read one step late so that the devices always have the next one to work on.
Logged, shown, and judged: too many in a row that are not finite end a run. Second floor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llm.training.metrics import MetricsWriter, to_float
from llm.training.progress import Progress, Throughput
from llm.training.run_config import RunConfig

_SKIPPED = "train/skipped_in_a_row"


class NonFiniteError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class Amounts:
    """What a run does in all, and in a step."""

    total_steps: int
    tokens_per_step: int
    flops_per_step: float = 0.0
    peak_flops: float | None = None  # a second, of all devices


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One step's numbers by name, and the sequences that it learnt from."""

    step: int
    values: Mapping[str, float | int]
    sequences: tuple[int, int] | None  # of the global order, from … up to, where there is one

    @property
    def finite(self) -> bool:
        """Whether the step changed anything: else its loss or gradient was not finite."""
        return not self.values.get(_SKIPPED)


class StepLog:
    """Takes each step's metrics as they are on the devices, and reads the step before's."""

    def __init__(
        self,
        metrics: MetricsWriter | None,
        progress: Progress,
        amounts: Amounts,
        run_config: RunConfig,
    ):
        """`metrics` is None on all processes but the first: they only read."""
        self._metrics, self._progress = metrics, progress
        self._amounts, self._run_config = amounts, run_config
        self.throughput = Throughput()
        self._pending: tuple[int, Mapping[str, Any], tuple[int, int] | None] | None = None

    def push(
        self, step: int, metrics: Mapping[str, Any], sequences: tuple[int, int] | None
    ) -> StepMetrics | None:
        """Take a step's metrics; return those of the step before if nobody has read them."""
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        found = self.read()
        self._pending = (step, metrics, sequences)
        self.throughput.tick()
        return found

    def drop(self) -> None:
        """Forget what was not read: its step is about to be done again."""
        self._pending = None

    def read(self) -> StepMetrics | None:
        """Wait for the last step pushed, log and show it; None where it was read before.

        Raises:
          NonFiniteError: run.max_skipped_in_a_row steps had no finite loss or gradient.
        """
        if self._pending is None:
            return None
        (step, metrics, sequences), self._pending = self._pending, None
        values = {name: to_float(name, x) for name, x in jax.device_get(dict(metrics)).items()}
        found = StepMetrics(step, values, sequences)
        if not found.finite and sequences is not None:
            values["train/sequences_begin"], values["train/sequences_end"] = sequences
        every = self._run_config.log_every_steps
        due = step % every == 0 or step in (1, self._amounts.total_steps)
        mean_seconds = self.throughput.end_interval() if due else None
        if self._metrics is not None:
            if due or not found.finite:
                # What a stage measures itself stands: not all its positions are tokens, perhaps.
                self._metrics.write(step, self._speed(mean_seconds) | values)
            self._show(step, values)
        if not found.finite:
            self._judge(found)
        return found

    def _judge(self, found: StepMetrics) -> None:
        begin, end = found.sequences or (None, None)
        if self._metrics is not None:
            self._progress.say(
                f"step {found.step}: loss or gradient is not finite; parameters are left as they "
                "were" + ("" if end is None else f" (sequences {begin} to {end - 1} of the data)")
            )
        skipped, most = found.values[_SKIPPED], self._run_config.max_skipped_in_a_row
        if skipped >= most:
            raise NonFiniteError(
                f"{skipped} steps in a row up to step {found.step} had no finite loss or gradient "
                f"(run.max_skipped_in_a_row={most}). The parameters are those before them: lower "
                "the learning rate, or look at the data"
            )

    def _show(self, step: int, values: Mapping[str, float | int]) -> None:
        seconds = self.throughput.seconds_per_step
        speed = self._speed(seconds) | values
        self._progress.update(
            step,
            values.get("train/loss"),
            seconds_per_step=seconds,
            tokens_per_second=speed.get("perf/tokens_per_second"),
            mfu=speed.get("perf/mfu"),
        )

    def _speed(self, seconds_per_step: float | None) -> dict[str, float]:
        if not seconds_per_step:
            return {}
        amounts = self._amounts
        speed = {
            "perf/step_seconds": seconds_per_step,
            "perf/tokens_per_second": amounts.tokens_per_step / seconds_per_step,
        }
        if amounts.flops_per_step and amounts.peak_flops:
            speed["perf/mfu"] = amounts.flops_per_step / seconds_per_step / amounts.peak_flops
        return {name: float(f"{value:.4g}") for name, value in speed.items()}
