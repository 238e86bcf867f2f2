"""One run in one workdir: restores, counts steps, logs, saves, leaves in order when told to.
Only composes the pieces beside it; the loop, evaluation and sampling stay in the entry point."""

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from llm.training.checkpoints import Restored
from llm.training.config import SpikeConfig
from llm.training.feed import Feed
from llm.training.files import absolute
from llm.training.goodput import Goodput, read_goodput
from llm.training.identity import Identity
from llm.training.lock import Lock
from llm.training.metrics import MetricsWriter
from llm.training.peers import Peers
from llm.training.preemption import EXIT_CODE, Preemption
from llm.training.profiling import ProfileWindow
from llm.training.progress import Progress
from llm.training.run_config import RunConfig, check_config, config_digest, record_config
from llm.training.saver import Saver
from llm.training.spikes import SpikeWatch
from llm.training.step_log import Amounts, StepLog, StepMetrics

log = logging.getLogger(__name__)


class Run:
    """A run, for use in a `with` statement around the training loop.

        run = Run(workdir, config, run_config, code=__file__, tokens_per_step=…, total_steps=…)
        with run:
            run.check_data(digests)
            state, batches = run.restore(state, batches)
            evaluate_if_due(run, state)   # of a run that was stopped before it could
            while run.step < run.total_steps:
                batch = next(batches)
                state, metrics = train_step(state, batch)
                state = run.after_step(state, metrics)
                evaluate_if_due(run, state)   # asks run.due, calls run.write_metrics

    Making it compares config and code with the workdir's: a mismatch shows before JAX starts.
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
        code: str = __file__,
        spikes: SpikeConfig | None = None,
    ):
        """`flops_per_token` and `peak_flops` (a second, of all devices) give MFU where known;
        `code` is the file with the loop, which with all that it imports must stay as it is.

        Raises:
          ConfigChangedError: the workdir was made with another config.
          IdentityChangedError: it was made by other code or with other libraries.
        """
        self.workdir = absolute(workdir)
        self.step = 0  # optimizer steps done
        self._planned_steps = total_steps
        self.total_steps = total_steps = min(total_steps, run_config.stop_at_step or total_steps)
        self.run_config = run_config
        self._config = config
        self._amounts = Amounts(
            total_steps, tokens_per_step, (flops_per_token or 0.0) * tokens_per_step, peak_flops
        )
        self._config_changes = check_config(
            self.workdir, config, allow_change=run_config.allow_config_change
        )
        self._identity = Identity(self.workdir, code, run_config)
        self._identity.check()
        self._goodput = Goodput(self.workdir)
        self._preemption = Preemption()
        self._progress = Progress(total_steps)
        self._spikes = SpikeWatch(spikes, self.workdir)
        self._feed: Feed | None = None
        self._state: Any = None  # after the last step, until the next one overwrites it
        self._body_done = True  # evaluation and samples of this step are over
        self._first_step: int | None = None  # after the restore

    def __enter__(self) -> "Run":
        """Take the workdir's lock, record the config, and watch for signals.

        Raises:
          WorkdirInUseError: another run is going on in the workdir.
        """
        run_config = self.run_config
        run_config.check_processes(jax.process_count())
        self._primary = jax.process_index() == 0
        self._peers = Peers(str(self.workdir), run_config.hang_timeout_seconds)
        lock = Lock(self.workdir)
        with contextlib.ExitStack() as stack:
            self._goodput.listen()
            stack.callback(self._goodput.close)
            stack.enter_context(self._peers)
            if self._primary:
                self.workdir.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                stack.callback(lock.release)
                record_config(self.workdir, self._config, self._config_changes)
                self._identity.record()
            self._peers.meet("lock")  # that of a dead run on a store is waited for
            self._preemption.start(jax.process_count())
            stack.callback(self._preemption.stop)
            self._metrics = MetricsWriter(
                self.workdir,
                wandb_project=run_config.wandb_project,
                patient=run_config.go_on_after_failed_save,
                guard=lock.check,
            )
            stack.callback(self._metrics.close)
            stack.callback(self._progress.close)
            writer = self._metrics if self._primary else None
            self._log = StepLog(writer, self._progress, self._amounts, run_config)
            total, guard = self.total_steps, lock.check
            self._saver = Saver(self.workdir, run_config, writer, total, self.say, guard)
            window = run_config.profile_start_step, run_config.profile_num_steps
            self._profile = ProfileWindow(self.workdir / "profile", *window)
            stack.callback(self._profile.close)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, exc_type, error: BaseException | None, traceback) -> None:
        """Write the last metrics, wait for the last save, close everything.

        Raises:
          CheckpointError: the last save failed, and no other error is on its way.
        """
        if error is not None:
            self._peers.failed(error)
        self._peers.moved(self.step, patient=True)
        with self._cleanup:
            try:
                with self._goodput.during("save"):
                    self._observe(self._log.read())
                    # After an error the rest of this step's body, an evaluation, is still due.
                    self._saver.commit(self.step, body_done=error is None)
                    self._saver.checkpointer.close()
                if error is None or isinstance(error, SystemExit):
                    self._goodput.write()
                    self.say(read_goodput(self.workdir).describe())
            except Exception as second:
                if error is None:
                    raise
                log.warning("while stopping: %s", second)  # the first error is the one to see
        if error is None and self._preemption.signal_name:
            raise SystemExit(EXIT_CODE)  # it came after the last step; what follows can wait

    def check_data(self, digests: Mapping[str, str]) -> None:
        """Compare what the run reads, by name, with what it read when it began; and record it.

        Raises:
          IdentityChangedError: it is other data, and run.allow_data_change is not set.
        """
        self._identity.check_data(digests, record=self._primary)

    def restore(self, state: Any, batches: Any) -> tuple[Any, Any]:
        """Return state and batches to go on with: those of the newest good checkpoint, if any.

        Arrays get the shardings of the state given, which may be abstract where a checkpoint is
        sure to exist. `batches` has a method `seek(cursor)`; None is allowed. What is returned in
        its place is to be used instead of it.
        """
        started = time.perf_counter()
        with self._goodput.during("restore"):
            if batches is not None:
                self._feed = Feed(batches, lambda: self.step, self._goodput, self._spikes)
            self._saver.checkpointer.discard(self._spikes.abandoned_steps)
            restored = self._saver.checkpointer.restore(state)
            if self._primary:
                self._goodput.open(0 if restored is None else restored.manifest["step"])
            state = self._go_on_from(restored, state)
            if restored is not None:
                self.say(
                    f"resumed at step {self.step} of {self.total_steps} from {self.workdir} "
                    f"(verified in {time.perf_counter() - started:.1f} s)"
                )
            if self._primary:
                self._progress.start(self.step)
            self._peers.moved(self.step, patient=True)
            self._profile.open(self.step, self.total_steps)
            self._first_step = self.step
            state = self._rewind_if_due(state)
        self._goodput.enter("evaluate")
        return state, self._feed

    def after_step(self, state: Any, metrics: Mapping[str, Any]) -> Any:
        """Count a step; log, show, save, rewind or leave as is due. Return the state to go on with.

        `metrics` are scalars by name, on the devices; they are read at the next step. Only a save
        waits for the devices.

        Raises:
          CheckpointError: a save failed, this one or an earlier one in the background, and
            run.go_on_after_failed_save is not set.
          LogError: a log could not be written, likewise.
          NonFiniteError: max_skipped_in_a_row steps had no finite loss or gradient.
          SystemExit: code 75, after a signal, when this step is safe on disk.
        """
        if self._first_step is None:
            raise RuntimeError("run.after_step was called before run.restore; restore comes first")
        self._state = None
        self._saver.commit(self.step, body_done=True)
        self._saver.tolerate(self.step, self._saver.checkpointer.check)
        self.step = step = self.step + 1
        self._peers.moved(self.step)
        self._body_done = False
        self._preemption.armed = True
        sequences = None if self._feed is None else self._feed.sequences
        self._observe(self._log.push(self.step, metrics, sequences))
        self._peers.moved(self.step)
        if self._profile.after_step(self.step, (state, metrics)):
            self.say(f"profile written to {self.workdir / 'profile'}")
        self._state = state
        self._goodput.after_step(self.step)
        save_is_due = self._saver.is_due(self.step)
        if save_is_due:
            self._observe(self._log.read())  # a step is judged before it is saved
        state = self._rewind_if_due(state)
        if save_is_due and self.step == step:
            self._saver.tolerate(step, self._save)
        self._leave_if_asked(self._preemption.requested())
        self._goodput.enter("evaluate")
        return state

    def due(self, every_steps: int) -> bool:
        """Return whether something done every so many steps, and after the last, is due now.

        False for 0, which means never; and after a restore, if it was done before the save.
        """
        if self._state is not None and jax.process_count() == 1:
            # An evaluation could outlast the time that a signal leaves.
            self._leave_if_asked(self._preemption.requested())
        if every_steps <= 0 or self.step == 0 or self._body_done:
            return False
        due = self.step % every_steps == 0 or self.step == self.total_steps
        if due:
            self._log.throughput.skip()
            self._peers.moved(self.step, patient=True)
        return due

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write scalars by name, such as {"eval/loss": 3.2}, as one line at this step."""
        self._observe(self._log.read())  # the training metrics of this step come first
        if self._primary:
            self._metrics.write(self.step, metrics)

    def write_texts(self, texts: Mapping[str, str], *, ahead: bool = False) -> None:
        """Write texts by name, such as samples, at this step: to texts.jsonl and TensorBoard.

        `ahead`: at the step under way, before `after_step`, which may save it and leave.
        """
        if self._primary:
            self._metrics.write_texts(self.step + ahead, texts)

    def say(self, text: str) -> None:
        """Print a line above the live progress line."""
        if self._primary:
            self._progress.say(text)

    def _observe(self, found: StepMetrics | None) -> None:
        if found is None:
            return
        if found.step == self._first_step + 1:
            self.say(f"first step done {self._goodput.describe_start()}")
        if found.finite and found.sequences is not None and "train/loss" in found.values:
            self._spikes.observe(found.step, found.values["train/loss"], found.sequences)

    def _save(self) -> None:
        """Start saving the current step."""
        self._observe(self._log.read())  # a checkpoint must not be newer than the log
        with self._goodput.during("save"):
            cursor = getattr(self._state, "cursor", None)
            notes = {
                "tokens": self.step * self._amounts.tokens_per_step,
                "total_steps": self._planned_steps,
                "cursor": None if cursor is None else int(cursor),
                "config_digest": config_digest(self._config),
                "spikes": self._spikes.state(),
            }
            self._saver.save(self.step, self._state, notes)
        self._log.throughput.skip()

    def _leave_if_asked(self, asked: bool) -> None:
        if not asked:
            return
        if self._saver.saved_step != self.step:
            self._save()
        with self._goodput.during("save"):
            self._saver.commit(self.step, body_done=False)
            self._saver.checkpointer.wait()
        self.say(
            f"{self._preemption.signal_name}: step {self.step} is saved in {self.workdir}; the "
            f"same command goes on from there (exit code {EXIT_CODE})"
        )
        raise SystemExit(EXIT_CODE)

    def _go_on_from(self, restored: Restored | None, state: Any) -> Any:
        """Take a checkpoint's step, place in the data and logs; return its state."""
        manifest = {} if restored is None else restored.manifest
        self.step = manifest.get("step", 0)
        self._body_done = manifest.get("body_done", restored is None)
        self._saver.go_on_from(-1 if restored is None else self.step)
        self._spikes.restore(manifest.get("spikes"))
        if self._feed is not None and manifest.get("cursor") is not None:
            self._feed.seek(manifest["cursor"])
        if self._primary:
            sizes = None if restored is None else manifest.get("log_bytes", {})
            self._metrics.close()
            self._metrics.open(self.step, sizes, self._config)
        return state if restored is None else restored.state

    def _rewind_if_due(self, state: Any) -> Any:
        """After a loss spike go back to a checkpoint before it, and past its batches; once."""
        spike = self._spikes.spike
        if spike is None:
            return state
        rose = f"step {spike.step}: the loss rose from {spike.usual:.4g} to {spike.loss:.4g}"
        target = self._spikes.rewind_step(self.run_config.save_every_steps)
        self._peers.moved(self.step, patient=True)
        with self._goodput.during("restore"):
            restored = self._saver.go_back(self.step, state, target)
            if restored is None:
                self._spikes.let_pass()
                self.say(f"{rose}. No checkpoint is at step {target} or before: training goes on")
                return state
            self._goodput.rewind()
            self._log.drop()
            self._state = None
            manifest = restored.manifest
            skip = self._spikes.record(manifest["step"], manifest["cursor"], write=self._primary)
            self._saver.checkpointer.discard(self._spikes.abandoned_steps)
            state = self._go_on_from(restored, state)
        self._log.throughput.skip()
        self.say(
            f"{rose}. Going on from step {self.step}, without sequences {skip.from_cursor} to "
            f"{skip.to_cursor - 1} of the data"
        )
        return state
