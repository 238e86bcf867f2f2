"""Checkpoints that can be trusted: Orbax writes the arrays, a manifest makes a step valid,
and nothing is restored that does not agree with it to the bit."""

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llm.training import manifests
from llm.training.digests import (
    array_digests,
    combine_digests,
    finish_digest,
    named_leaves,
    start_digest,
)
from llm.training.files import absolute, append_json_line, is_local
from llm.training.manifests import CHECKPOINTS, LEDGER, CorruptStepError, list_steps, shorten
from llm.training.stored_arrays import check_structure, nest, params_digest, read_arrays

_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's mark on a directory that it has not committed
_DELETED = "deleted-"

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
    no longer wants: never before a newer one is valid.
    """

    def __init__(self, workdir: epath.PathLike, *, keep_newest: int = 3, keep_every_steps: int = 0):
        self.workdir = absolute(workdir)
        self.directory = self.workdir / CHECKPOINTS
        self._keep_newest = keep_newest
        self._keep_every_steps = keep_every_steps
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
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
        """
        self.wait()
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
            self._probe()
            self._orbax.save(self._path(step), args=ocp.args.PyTreeSave(nest(named)))
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

    def discard(self, steps: Sequence[int]) -> None:
        """Delete steps, on disk at once as if they had never been there."""
        if jax.process_index() == 0:
            for step in steps:
                self._delete(step)
        if steps:
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
        for step in reversed(manifests.step_numbers(self.directory)):
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

    def _probe(self) -> None:
        """Raise at once where no directory can be made: Orbax would wait for it for minutes."""
        if jax.process_index() == 0 and is_local(self.directory):
            probe = self.directory / f"{_DELETED}probe"
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _failure(self, error: Exception) -> CheckpointError:
        """Return what to raise, and remove what the failed save has left: it takes room."""
        if jax.process_count() == 1:  # with several the next restore does it, when all agree
            with contextlib.suppress(OSError):
                self._remove_unfinished()
        good = list_steps(self.workdir)
        return CheckpointError(
            f"saving step {self._saving_step} to {self.directory} failed: {error!r}. "
            + (f"The last good step is {good[-1]}." if good else "There is no good step yet.")
        )

    def _finish(self, step: int, arrays: dict[str, Any], digests: dict[str, Any]) -> None:
        """In the background: everything between the copy to the host and a valid step."""
        self._orbax.wait_until_finished()
        process, num_processes = jax.process_index(), jax.process_count()
        files = manifests.hash_files(
            self._path(step), process_index=process, num_processes=num_processes
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
        manifests.write_manifest(self._path(step), manifest)
        append_json_line(self.workdir / LEDGER, manifests.ledger_row(manifest))
        self._delete_unwanted(newest=step)

    def _restore_step(self, step: int, target: Any) -> Restored:
        path = self._path(step)
        manifest, problems = None, []
        try:
            manifest = manifests.read_manifest(path)
            problems = manifests.check_files(
                path,
                manifest,
                process_index=jax.process_index(),
                num_processes=jax.process_count(),
            )
        except CorruptStepError as error:
            problems = [str(error)]
        _raise_if_corrupt(problems)
        wanted = named_leaves(target)
        check_structure(manifest, wanted, path)
        read = read_arrays(path, wanted)
        _raise_if_corrupt(manifests.check_arrays(manifest, array_digests(read)))
        structure = jax.tree.structure(target)
        return Restored(jax.tree.unflatten(structure, [read[name] for name in wanted]), manifest)

    def _set_aside(self, step: int, problem: str) -> None:
        if jax.process_index() == 0:
            target, copies = self.directory / f"corrupt-{step}", 1
            while target.exists():
                copies += 1
                target = self.directory / f"corrupt-{step}-{copies}"
            log.warning(
                "checkpoint %s is corrupt: %s. Set aside as %s; trying an older step",
                self._path(step),
                problem,
                target.name,
            )
            self._path(step).rename(target)
        _wait_for_all("set_aside")

    def _remove_unfinished(self) -> None:
        """Remove what a killed run left: steps that never became valid, and half-deleted ones."""
        if jax.process_index() == 0 and self.directory.exists():
            once_valid = {row["step"] for row in manifests.read_ledger(self.workdir)}
            for path in self.directory.iterdir():
                if _TEMPORARY in path.name or path.name.startswith(_DELETED):
                    path.rmtree()
            for step in manifests.step_numbers(self.directory):
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
        keep = set(steps[-self._keep_newest :])
        if self._keep_every_steps:
            keep |= {step for step in steps if step % self._keep_every_steps == 0}
        for step in steps:
            if step not in keep:
                self._delete(step)

    def _delete(self, step: int) -> None:
        # Renamed first: a crash while deleting must not leave a step that looks whole.
        doomed = self.directory / f"{_DELETED}{step}"
        self._path(step).rename(doomed)
        doomed.rmtree()


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
