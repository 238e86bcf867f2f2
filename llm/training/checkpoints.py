"""Checkpoints that can be trusted: Orbax writes the arrays, a manifest makes a step valid,
and nothing is restored that does not agree with it to the bit."""

import concurrent.futures
import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llm.training import manifests, step_directories
from llm.training.digests import (
    array_digests,
    combine_digests,
    finish_digest,
    named_leaves,
    start_digest,
)
from llm.training.files import absolute, append_json_line, is_local, local_copy
from llm.training.lease import WorkdirInUseError
from llm.training.manifests import CHECKPOINTS, LEDGER, CorruptStepError, list_steps, shorten
from llm.training.stored_arrays import (
    check_structure,
    chunk_shapes,
    files_to_read,
    make_writer,
    nest,
    params_digest,
    read_arrays,
)

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none of those there can be restored."""


class Restored(NamedTuple):
    """A state as it was saved, and the manifest of its step."""

    state: Any
    manifest: dict[str, Any]


class Checkpointer:
    """Saves steps of one workdir asynchronously and restores the newest good one.

    `save` returns when the arrays are copied from the devices; a thread then waits for Orbax's
    commit, hashes the files, writes the manifest and the ledger, and deletes steps that retention
    no longer wants: never before a newer one is valid. A workdir on an object store gets its files
    from a temporary directory (of $TMPDIR), with room for one step: of several processes each has
    its own, with room for its part of a step, and puts that part.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep_newest: int = 3,
        keep_every_steps: int = 0,
        regular_steps: int = 1,
        guard: Callable[[], None] = lambda: None,
    ):
        """`keep_newest` counts the multiples of `regular_steps`; others, saved by chance, go when
        there is a newer one. `guard` raises where the workdir is another run's by now."""
        self.workdir = absolute(workdir)
        self.directory = self.workdir / CHECKPOINTS
        self._guard = guard
        self._temporary = None
        self._staging = self.directory  # where Orbax writes
        if not is_local(self.workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="checkpoints_")
            self._staging = epath.Path(self._temporary.name)
        self._keep_newest = keep_newest
        self._keep_every_steps, self._regular_steps = keep_every_steps, regular_steps
        self._apart = self._temporary is not None and jax.process_count() > 1
        self._orbax = make_writer(apart=self._apart)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._saving: concurrent.futures.Future | None = None
        self._saving_step = -1
        self._committed = threading.Event()
        self._notes: dict[str, Any] = {}

    def save(
        self, step: int, state: Any, notes: dict[str, Any] | None = None, *, hold: bool = False
    ) -> None:
        """Start saving a step. Waits for an earlier save, and for the copy from the devices.

        `notes` go into the manifest. With `hold` the step does not become valid before `commit`.

        Raises:
          CheckpointError: an earlier save failed, or this one could not start.
          WorkdirInUseError: another run may be writing in the workdir.
        """
        self.wait()
        self._guard()
        named = named_leaves(state)
        # Queued on the devices before the next step can overwrite a donated state; read later.
        digests = {name: start_digest(leaf) for name, leaf in named.items()}
        arrays = {
            name: {"shape": list(np.shape(leaf)), "dtype": str(leaf.dtype)}
            for name, leaf in named.items()
        }
        self._saving_step, self._notes = step, dict(notes or {})
        self._committed.clear()
        try:
            if jax.process_index() == 0:  # the others put files there only after Orbax's barrier
                step_directories.make_room(self.directory, step)
            self._orbax.save(self._staging / str(step), args=ocp.args.PyTreeSave(nest(named)))
        except Exception as error:
            raise self._failure(error) from error
        self._saving = self._executor.submit(self._finish, step, arrays, digests)
        if not hold:
            self.commit({})

    def commit(self, notes: dict[str, Any]) -> None:
        """Allow a held step to become valid, adding notes to its manifest."""
        if not self._committed.is_set():
            self._notes |= notes
            self._committed.set()

    def check(self) -> None:
        """Raise the error of a save that has failed in the background; never waits.

        Raises:
          CheckpointError: the save failed.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is valid on disk, committing it if that was not done.

        Raises:
          CheckpointError: the save failed.
        """
        if self._saving is None:
            return
        self.commit({})
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Wait for the last save and end the threads."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._orbax.close()
            if self._temporary is not None:
                self._temporary.cleanup()

    def settle(self) -> None:
        """Wait until every process has saved and deleted what it had to: all see the same steps."""
        self.wait()
        _wait_for_all("settle")

    def discard(self, find_steps: Callable[[], Sequence[int]]) -> None:
        """Delete steps, for all processes at once as if they had never been there."""
        self.settle()
        if jax.process_index() == 0:  # the others might look when some are deleted already
            for step in find_steps():
                # Noted first, or a crash while it is saved again would look like damage.
                manifests.note_discarded(self.workdir, step)
                step_directories.delete(self.directory, step)
        _wait_for_all("discard")

    def restore(self, target: Any, *, at_most: int | None = None) -> Restored | None:
        """Return the newest good step (not above `at_most`), or None in a workdir without any.

        Each array comes with the dtype and sharding of the target's (concrete or abstract). A bad
        step is named in a warning and set aside as `corrupt-<step>`; the next older one is tried.

        Raises:
          CheckpointError: there were steps and none is good.
          ValueError: the checkpoint's arrays are not those of the target.
        """
        self.wait()
        self._remove_unfinished()
        for step in reversed(step_directories.step_numbers(self.directory)):
            if at_most is not None and step > at_most:
                continue
            try:
                restored = self._restore_step(step, target)
            except CorruptStepError as error:
                self._set_aside(step, str(error))
                continue
            self._complete_ledger(restored.manifest)
            return restored
        known = {row["step"] for row in manifests.read_ledger(self.workdir)}
        if known:
            raise CheckpointError(
                f"{self.workdir}: the ledger names steps {sorted(known)[-8:]} but none of "
                f"them is good. To start over from step 0, move {LEDGER} and {CHECKPOINTS}/ away"
            )
        return None

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _failure(self, error: Exception) -> CheckpointError:
        """Return what to raise, and remove what the failed save has left: it takes room."""
        known = "Which step is the last good one cannot be asked now."
        with contextlib.suppress(OSError, WorkdirInUseError):  # the first error is the one to see
            if self._temporary is not None:
                for path in self._staging.iterdir():
                    path.rmtree()
            self._guard()
            if jax.process_count() == 1:  # with several the next restore does it, when all agree
                with contextlib.suppress(OSError):
                    self._remove_unfinished()
            good = list_steps(self.workdir)
            known = f"The last good step is {good[-1]}." if good else "There is no good step yet."
        return CheckpointError(
            f"saving step {self._saving_step} to {self.directory} failed: {error!r}. {known}"
        )

    def _finish(self, step: int, arrays: dict[str, Any], digests: dict[str, Any]) -> None:
        """In the background: everything between the copy to the host and a valid step."""
        self._orbax.wait_until_finished()
        process, num_processes = jax.process_index(), jax.process_count()
        staged, names = self._staging / str(step), manifests.step_files(self._staging / str(step))
        if self._apart and not process:
            for name, shape in chunk_shapes(staged, arrays).items():
                arrays[name]["chunks"] = shape
        if not self._apart:  # all see the same files: each hashes a share
            share = names[process::num_processes]
        else:  # each has its own, and the marks of a whole directory all have
            share = [name for name in names if "/" in name or not process]
        files = manifests.hash_files(staged, share)
        self._guard()
        step_directories.publish(staged, self._path(step), share)
        files = manifests.gather_hashes(
            self._path(step), files, process_index=process, num_processes=num_processes
        )
        found = {name: finish_digest(sums) for name, sums in digests.items()}
        self._committed.wait()
        if process:
            return
        manifest = {
            "format": 1,
            "step": step,
            "time": time.time(),
            "params_digest": params_digest(found),
            "state_digest": combine_digests(found),
            **self._notes,
            "arrays": {name: {**arrays[name], "digest": found[name]} for name in arrays},
            "files": files,
        }
        self._guard()
        manifests.write_manifest(self._path(step), manifest)
        append_json_line(self.workdir / LEDGER, manifests.ledger_row(manifest))
        self._delete_unwanted(newest=step)

    def _restore_step(self, step: int, target: Any) -> Restored:
        try:
            manifest = manifests.read_manifest(self._path(step))
        except CorruptStepError as error:
            _raise_if_corrupt([str(error)])
        wanted = named_leaves(target)
        if is_local(self.workdir):  # all processes read the same files: each verifies a share
            names = sorted(manifest["files"])[jax.process_index() :: jax.process_count()]
        else:  # each has its own copy, of what it needs
            names = files_to_read(manifest, wanted)
        with local_copy(self._path(step), names) as path:
            _raise_if_corrupt(manifests.check_files(path, manifest, names))
            check_structure(manifest, wanted, self._path(step))
            read = read_arrays(path, wanted)
        _raise_if_corrupt(manifests.check_arrays(manifest, array_digests(read)))
        structure = jax.tree.structure(target)
        return Restored(jax.tree.unflatten(structure, [read[name] for name in wanted]), manifest)

    def _set_aside(self, step: int, problem: str) -> None:
        if jax.process_index() == 0:
            log.warning(
                "checkpoint %s is corrupt: %s. Set aside as %s; trying an older step",
                self._path(step),
                problem,
                step_directories.set_aside(self.directory, step, problem),
            )
        _wait_for_all("set_aside")

    def _remove_unfinished(self) -> None:
        """Remove what a killed run left: steps that never became valid, and half-deleted ones."""
        if jax.process_index() == 0 and self.directory.exists():
            once_valid = manifests.once_valid(self.workdir)
            step_directories.remove_remains(self.directory)
            for step in step_directories.step_numbers(self.directory):
                valid = (self._path(step) / manifests.MANIFEST).exists()
                # Once in the ledger, a missing manifest is damage: restore names it.
                if not valid and step not in once_valid:
                    log.warning("removing %s: the run ended while saving it", self._path(step))
                    self._path(step).rmtree()
        _wait_for_all("remove_unfinished")

    def _complete_ledger(self, manifest: dict[str, Any]) -> None:
        """Add the line of a run that was killed between writing manifest and ledger."""
        row = manifests.ledger_row(manifest)
        if jax.process_index() == 0 and row not in manifests.read_ledger(self.workdir):
            append_json_line(self.workdir / LEDGER, row)

    def _delete_unwanted(self, newest: int) -> None:
        steps = [step for step in list_steps(self.workdir) if step <= newest]
        regular = [step for step in steps if step % self._regular_steps == 0]
        keep = {newest, *regular[-self._keep_newest :]}
        if self._keep_every_steps:
            keep |= {step for step in steps if step % self._keep_every_steps == 0}
        for step in steps:
            if step not in keep:
                step_directories.delete(self.directory, step)


def _raise_if_corrupt(problems: list[str]) -> None:
    """Raise on every process when one of them has found a problem, so that all try the same step.

    Raises:
      CorruptStepError: there is a problem.
    """
    found = bool(problems)
    if jax.process_count() > 1:
        found = bool(multihost_utils.process_allgather(np.bool_(found)).any())
    if found:
        raise CorruptStepError(shorten(problems) or "another process found it corrupt")


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
