"""One run in one workdir: restores, counts steps, logs, saves, leaves in order when told to.
Only composes the pieces beside it; the loop, evaluation and sampling stay in the entry point."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from llm.training.checkpoints import Checkpointer, CheckpointError
from llm.training.files import absolute
from llm.training.lock import Lock
from llm.training.metrics import LogError, MetricsWriter, to_float
from llm.training.preemption import EXIT_CODE, Preemption
from llm.training.profiling import ProfileWindow
from llm.training.progress import Progress, Throughput
from llm.training.run_config import RunConfig, check_config, config_digest, record_config

_SKIPPED = "train/skipped_in_a_row"

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


class Run:
    """A run, for use in a `with` statement around the training loop.

        run = Run(workdir, config, run_config, tokens_per_step=…, total_steps=…)
        with run:
            state, batches = run.restore(state, batches)
            evaluate_if_due(run, state)   # of a run that was stopped before it could
            while run.step < total_steps:
                batch = next(batches)
                state, metrics = train_step(state, batch)
                state = run.after_step(state, metrics)
                evaluate_if_due(run, state)   # asks run.due, calls run.write_metrics

    Making it reads the workdir's config and no more, so a mismatch shows before JAX starts.
    The state's arrays are saved; of its fields only `cursor` is known here, the place in the data.
    Metrics are read one step late, so that the devices always have the next step to work on.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: Mapping[str, Any],
        run_config: RunConfig,
        *,
        total_steps: int,
        tokens_per_step: int,
        flops_per_token: float | int | None = None,
        peak_flops: float | int | None = None,
    ):
        """`flops_per_token` and `peak_flops` (a second, of all devices) give MFU where known.

        Raises:
          ConfigChangedError: the workdir was made with another config.
        """
        self.workdir = absolute(workdir)
        self.step = 0  # optimizer steps done
        self.total_steps = total_steps
        self._config = config
        self.run_config = run_config
        self._tokens_per_step = tokens_per_step
        self._step_flops = (flops_per_token or 0.0) * tokens_per_step
        self._peak_flops = peak_flops
        self._config_changes = check_config(
            self.workdir, config, allow_change=run_config.allow_config_change
        )
        self._preemption = Preemption()
        self._progress = Progress(total_steps)
        self._throughput = Throughput()
        self._pending: tuple[int, Mapping[str, Any]] | None = None  # metrics not yet read
        self._state: Any = None  # after the last step, until the next one overwrites it
        self._body_done = True  # evaluation and samples of this step are over
        self._restored = False
        self._saved_step = -1
        self._saved_sizes: dict[str, int] = {}  # of the logs, when it was saved

    def __enter__(self) -> "Run":
        """Take the workdir's lock, record the config, and watch for signals.

        Raises:
          WorkdirInUseError: another run is going on in the workdir.
        """
        run_config = self.run_config
        if run_config.save_every_seconds is not None and jax.process_count() > 1:
            raise ValueError(
                f"run.save_every_seconds={run_config.save_every_seconds}: the clocks of "
                f"{jax.process_count()} processes disagree; use run.save_every_steps"
            )
        self._primary = jax.process_index() == 0
        with contextlib.ExitStack() as stack:
            if self._primary:
                self.workdir.mkdir(parents=True, exist_ok=True)
                lock = Lock(self.workdir)
                lock.acquire()
                stack.callback(lock.release)
                record_config(self.workdir, self._config, self._config_changes)
            self._preemption.start(jax.process_count())
            stack.callback(self._preemption.stop)
            self._metrics = MetricsWriter(
                self.workdir,
                wandb_project=run_config.wandb_project,
                patient=run_config.go_on_after_failed_save,
            )
            stack.callback(self._metrics.close)
            stack.callback(self._progress.close)
            self._checkpointer = Checkpointer(
                self.workdir,
                keep_newest=run_config.keep_newest_checkpoints,
                keep_every_steps=run_config.keep_every_steps,
            )
            self._profile = ProfileWindow(
                self.workdir / "profile",
                run_config.profile_start_step,
                run_config.profile_num_steps,
            )
            stack.callback(self._profile.close)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, exc_type, error: BaseException | None, traceback) -> None:
        """Write the last metrics, wait for the last save, close everything.

        Raises:
          CheckpointError: the last save failed, and no other error is on its way.
        """
        with self._cleanup:
            try:
                self._read_pending()
                # After an error the rest of this step's body, an evaluation perhaps, is still due.
                self._commit(body_done=error is None)
                self._checkpointer.close()
            except Exception as second:
                if error is None:
                    raise
                log.warning("while stopping: %s", second)  # the first error is the one to see
        if error is None and self._preemption.signal_name:
            raise SystemExit(EXIT_CODE)  # it came after the last step; what follows can wait

    def restore(self, state: Any, batches: Any) -> tuple[Any, Any]:
        """Return state and batches to go on with: those of the newest good checkpoint, if any.

        Arrays get the shardings of the state given, which may be abstract where a checkpoint is
        sure to exist. `batches` has a method `seek(cursor)`; None is allowed.
        """
        started = time.perf_counter()
        restored = self._checkpointer.restore(state)
        sizes: dict[str, int] | None = None
        if restored is not None:
            state, manifest = restored
            self.step = self._saved_step = manifest["step"]
            self._body_done = manifest.get("body_done", False)
            sizes = manifest.get("log_bytes", {})
            if batches is not None and manifest.get("cursor") is not None:
                batches.seek(manifest["cursor"])
            self.say(
                f"resumed at step {self.step} of {self.total_steps} from {self.workdir} "
                f"(verified in {time.perf_counter() - started:.1f} s)"
            )
        if self._primary:
            self._metrics.open(self.step, sizes, self._config)
            self._progress.start(self.step)
        self._last_save_time = time.monotonic()
        self._profile.open(self.step, self.total_steps)
        self._restored = True
        return state, batches

    def after_step(self, state: Any, metrics: Mapping[str, Any]) -> Any:
        """Count a step, and log, show, save or leave as is due; return the state to go on with.

        `metrics` are scalars by name, on the devices; they are read at the next step. Only a save
        waits for the devices.

        Raises:
          CheckpointError: a save failed, this one or an earlier one in the background, and
            run.go_on_after_failed_save is not set.
          LogError: a log could not be written, likewise.
          NonFiniteError: max_skipped_in_a_row steps had no finite loss or gradient.
          SystemExit: code 75, after a signal, when this step is safe on disk.
        """
        if not self._restored:
            raise RuntimeError("run.after_step was called before run.restore; restore comes first")
        self._state = None
        self._commit(body_done=True)
        self._tolerate(self._checkpointer.check)
        self.step += 1
        self._body_done = False
        self._preemption.armed = True
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._read_pending()
        self._pending = (self.step, metrics)
        self._throughput.tick()
        if self._profile.after_step(self.step, (state, metrics)):
            self.say(f"profile written to {self.workdir / 'profile'}")
        self._state = state
        if self._save_is_due():
            self._tolerate(self._save)
        self._leave_if_asked(self._preemption.requested(self.step))
        return state

    def due(self, every_steps: int) -> bool:
        """Return whether something done every so many steps, and after the last, is due now.

        False for 0, which means never; and after a restore, if it was done before the save.
        """
        if self._state is not None and jax.process_count() == 1:
            # An evaluation could outlast the time that a signal leaves.
            self._leave_if_asked(self._preemption.requested(self.step))
        if every_steps <= 0 or self.step == 0 or self._body_done:
            return False
        due = self.step % every_steps == 0 or self.step == self.total_steps
        if due:
            self._throughput.skip()
        return due

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write scalars by name, such as {"eval/loss": 3.2}, as one line at this step."""
        self._read_pending()  # the training metrics of this step come first
        if self._primary:
            self._metrics.write(self.step, metrics)

    def write_texts(self, texts: Mapping[str, str]) -> None:
        """Write texts by name, such as samples, at this step: to texts.jsonl and TensorBoard."""
        if self._primary:
            self._metrics.write_texts(self.step, texts)

    def say(self, text: str) -> None:
        """Print a line above the live progress line."""
        if self._primary:
            self._progress.say(text)

    def _read_pending(self) -> None:
        """Read the last step's metrics from the devices; log, show and judge them."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: to_float(name, x) for name, x in jax.device_get(dict(metrics)).items()}
        if step % self.run_config.log_every_steps == 0 or step in (1, self.total_steps):
            seconds = self._throughput.end_interval()
            if self._primary:
                # What a stage measures itself stands: not all of its positions are tokens, perhaps.
                self._metrics.write(step, self._speed(seconds) | values)
        if self._primary:
            seconds = self._throughput.seconds_per_step
            speed = self._speed(seconds) | values
            self._progress.update(
                step,
                values.get("train/loss"),
                seconds_per_step=seconds,
                tokens_per_second=speed.get("perf/tokens_per_second"),
                mfu=speed.get("perf/mfu"),
            )
        skipped = values.get(_SKIPPED, 0)
        if skipped >= self.run_config.max_skipped_in_a_row:
            raise NonFiniteError(
                f"{skipped} steps in a row up to step {step} had no finite loss or gradient "
                f"(run.max_skipped_in_a_row={self.run_config.max_skipped_in_a_row}). The "
                "parameters are those before them: lower the learning rate, or look at the data"
            )

    def _speed(self, seconds_per_step: float | None) -> dict[str, float]:
        if not seconds_per_step:
            return {}
        speed = {
            "perf/step_seconds": seconds_per_step,
            "perf/tokens_per_second": self._tokens_per_step / seconds_per_step,
        }
        if self._step_flops and self._peak_flops:
            speed["perf/mfu"] = self._step_flops / seconds_per_step / self._peak_flops
        return {name: float(f"{value:.4g}") for name, value in speed.items()}

    def _tolerate(self, save: Callable[[], None]) -> None:
        """Save or look after a save; where it failed and more steps follow, go on if so asked."""
        try:
            save()
        except (CheckpointError, LogError) as error:
            if not self.run_config.go_on_after_failed_save or self.step >= self.total_steps:
                raise
            self._last_save_time = time.monotonic()
            self.say(f"NOT SAVED: {error} Training goes on (run.go_on_after_failed_save).")

    def _save_is_due(self) -> bool:
        run_config = self.run_config
        if self.step >= self.total_steps:
            return True
        if run_config.save_every_steps and self.step % run_config.save_every_steps == 0:
            return True
        seconds = run_config.save_every_seconds
        return seconds is not None and time.monotonic() - self._last_save_time >= seconds

    def _save(self) -> None:
        """Start saving the current step. It becomes valid when the loop's body for it is over."""
        self._read_pending()  # a checkpoint must not be newer than the log
        self._saved_sizes = self._metrics.sync() if self._primary else {}
        cursor = getattr(self._state, "cursor", None)
        notes = {
            "tokens": self.step * self._tokens_per_step,
            "total_steps": self.total_steps,
            "cursor": None if cursor is None else int(cursor),
            "config_digest": config_digest(self._config),
        }
        self._checkpointer.save(self.step, self._state, notes, hold=True)
        self._saved_step = self.step
        self._last_save_time = time.monotonic()
        self._throughput.skip()

    def _commit(self, *, body_done: bool) -> None:
        """Let the step saved last become valid, with the logs as long as they are to be kept."""
        if body_done and self._primary and self._saved_step == self.step and self._saved_sizes:
            try:
                self._saved_sizes = self._metrics.sync()
            except LogError:
                if not self.run_config.go_on_after_failed_save:
                    raise
                body_done = False  # a run that goes on from this step will do it again
        self._checkpointer.commit({"body_done": body_done, "log_bytes": self._saved_sizes})

    def _leave_if_asked(self, asked: bool) -> None:
        if not asked:
            return
        if self._saved_step != self.step:
            self._save()
        self._commit(body_done=False)
        self._checkpointer.wait()
        self.say(
            f"{self._preemption.signal_name}: step {self.step} is saved in {self.workdir}; the "
            f"same command goes on from there (exit code {EXIT_CODE})"
        )
        raise SystemExit(EXIT_CODE)
