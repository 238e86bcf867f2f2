"""Loss spikes: go back to a checkpoint before one and on past the batches around it, once.
Second floor.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5.1: "we re-started training from a
checkpoint roughly 100 steps before the spike started, and skipped roughly 200–500 data batches".
They did it by hand; what counts as a spike is ours.
"""

import collections
import contextlib
import dataclasses
import math
import statistics
from typing import Any, NamedTuple

from etils import epath

from llm.training.config import SpikeConfig
from llm.training.files import append_json_line, read_json_lines
from llm.training.manifests import CHECKPOINTS, CorruptStepError, list_steps, read_manifest

SKIPS = "skipped_batches.jsonl"  # in the workdir
_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class Spike(NamedTuple):
    """A step whose loss rose too far, in nats, and the sequences that it learnt from."""

    step: int
    loss: float
    usual: float  # the median before it
    sequences_begin: int
    sequences_end: int


@dataclasses.dataclass(frozen=True)
class Skip:
    """After `step` steps, go on with sequence `to_cursor` of the data instead of `from_cursor`."""

    step: int
    from_cursor: int
    to_cursor: int
    spike_step: int
    loss: float
    usual: float


class SpikeWatch:
    """Sees every step's loss; knows which batches of this workdir are skipped.

    A run with the same skips in its workdir, rule or no rule, is bitwise the same run.
    """

    def __init__(self, config: SpikeConfig | None, workdir: epath.PathLike):
        self._config = config or SpikeConfig()
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / SKIPS
        self._losses: collections.deque[float] = collections.deque(maxlen=self._config.window_steps)
        self.skips = self._read()
        self.spike: Spike | None = None  # seen, and not yet dealt with
        self._quiet_until = -1  # the step

    def _read(self) -> list[Skip]:
        names = [field.name for field in dataclasses.fields(Skip)]
        try:
            return [Skip(*(row[name] for name in names)) for row in read_json_lines(self._path)]
        except KeyError as error:
            raise ValueError(f"{self._path}: a line without {error}; restore the file") from None

    def observe(self, step: int, loss: float, sequences: tuple[int, int]) -> None:
        """Take a step's loss, in nats; `spike` is set where it is one.

        One is a loss that lies `deviations` robust standard deviations above the median of a full
        window. After one there is none before its step and another window are passed: its batches
        are skipped once, and what comes back without them is not theirs.
        """
        if not self._config.deviations or not math.isfinite(loss):
            return
        full = len(self._losses) == self._config.window_steps
        if full and step > self._quiet_until and self.spike is None:
            usual = statistics.median(self._losses)
            spread = _TO_SIGMA * statistics.median(abs(x - usual) for x in self._losses)
            if loss > usual + self._config.deviations * spread:
                self.spike = Spike(step, loss, usual, *sequences)
        self._losses.append(loss)

    def let_pass(self) -> None:
        """Train through the spike, and what follows from it: there is no checkpoint before it."""
        self._be_quiet_after(self.spike.step)
        self.spike = None

    def _be_quiet_after(self, step: int) -> None:
        self._quiet_until = max(self._quiet_until, step + self._config.window_steps)

    def rewind_step(self, save_every_steps: int) -> int:
        """Return the step to go back to for the spike: one that every run saves."""
        latest = self.spike.step - self._config.rewind_steps
        return latest - latest % save_every_steps

    def record(self, step: int, from_cursor: int, *, write: bool) -> Skip:
        """Decide what is skipped for the spike, from a checkpoint's step and place on.

        `write`: to the workdir as well, which one process does.
        """
        spike, self.spike = self.spike, None
        skipped = self._config.skip_steps * (spike.sequences_end - spike.sequences_begin)
        to_cursor = max(from_cursor + skipped, spike.sequences_end)
        skip = Skip(step, from_cursor, to_cursor, spike.step, spike.loss, spike.usual)
        self.skips.append(skip)
        self._be_quiet_after(spike.step)
        if write:
            append_json_line(self._path, dataclasses.asdict(skip))
        return skip

    def jump(self, step: int) -> int | None:
        """Return the cursor to go on with after so many steps, where batches are skipped there."""
        for skip in reversed(self.skips):
            if skip.step <= step:  # going back to it made void what earlier ones skip after it
                return skip.to_cursor if skip.step == step else None
        return None

    def abandoned_steps(self) -> list[int]:
        """Return the saved steps that a rewind has left behind, but a killed run did not delete."""
        if not self.skips:
            return []
        abandoned = []
        for step in list_steps(self._workdir):
            with contextlib.suppress(CorruptStepError):  # restore will set it aside
                manifest = read_manifest(self._workdir / CHECKPOINTS / str(step))
                made_with = (manifest.get("spikes") or {}).get("skips", 0)
                later = self.skips[made_with:]
                if any(skip.step < step for skip in later):
                    abandoned.append(step)
        return abandoned

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        spike = None if self.spike is None else list(self.spike)
        return {
            "losses": list(self._losses),
            "spike": spike,
            "quiet_until": self._quiet_until,
            "skips": len(self.skips),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on as a checkpoint was."""
        self._losses.clear()
        self._losses.extend((state or {}).get("losses", []))
        spike = (state or {}).get("spike")
        self.spike = None if spike is None else Spike(*spike)
        self._quiet_until = (state or {}).get("quiet_until", -1)
        for skip in self.skips:  # those after the checkpoint too
            self._be_quiet_after(skip.spike_step)
