"""The metrics of steps, read one step late so that the devices always have the next one to work on.
Logged, shown, and handed to whoever judges them. Second floor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llm.training.metrics import MetricsWriter, to_float
from llm.training.progress import Progress, Throughput

SKIPPED = "train/skipped_in_a_row"


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


class StepLog:
    """Takes each step's metrics as they are on the devices, and reads the step before's."""

    def __init__(
        self, metrics: MetricsWriter | None, progress: Progress, amounts: Amounts, log_every: int
    ):
        """`metrics` is None on all processes but the first: they only read."""
        self._metrics, self._progress = metrics, progress
        self._amounts, self._log_every = amounts, log_every
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
        """Wait for the last step pushed, log and show it; None where it was read before."""
        if self._pending is None:
            return None
        (step, metrics, sequences), self._pending = self._pending, None
        values = {name: to_float(name, x) for name, x in jax.device_get(dict(metrics)).items()}
        if values.get(SKIPPED) and sequences is not None:
            values["train/sequences_begin"], values["train/sequences_end"] = sequences
        due = step % self._log_every == 0 or step in (1, self._amounts.total_steps)
        mean_seconds = self.throughput.end_interval() if due else None
        if self._metrics is not None:
            if due or values.get(SKIPPED):
                # What a stage measures itself stands: not all its positions are tokens, perhaps.
                self._metrics.write(step, self._speed(mean_seconds) | values)
            self._show(step, values)
        return StepMetrics(step, values, sequences)

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
