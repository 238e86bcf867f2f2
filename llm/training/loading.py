"""Reads checkpoints from outside a run: parameters for a later stage, and a full audit.
Changes nothing on disk, so it is safe beside a run that is training."""

import dataclasses
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llm.training import manifests
from llm.training.digests import array_digests, combine_digests, named_leaves
from llm.training.files import absolute, local_copy
from llm.training.manifests import CHECKPOINTS, CorruptStepError, list_steps, shorten
from llm.training.step_directories import step_numbers
from llm.training.stored_arrays import nest, read_arrays

log = logging.getLogger(__name__)


class LoadedParams(NamedTuple):
    """Parameters of one verified step, as nested dicts, and which they are."""

    params: dict[str, Any]
    step: int
    digest: str  # `tree_digest(params)`


def load_params(
    workdir: epath.PathLike,
    step: int | None = None,
    *,
    part: str = "",
    ema: bool = False,
    shardings: Any = None,
) -> LoadedParams:
    """Return the parameters of a step (by default the newest good one), every bit verified.

    They are NumPy arrays on the host, or lie on devices where `shardings` is given: one sharding
    for all, or a tree of them like the parameters. `part` takes one model of several ("policy");
    `ema` takes the averages of those that were trained.

    Raises:
      FileNotFoundError: the workdir has no such step.
      CorruptStepError: the step asked for is bad, or every step is.
      ValueError: a part or averages are asked for that the run does not have.
    """
    workdir = absolute(workdir)
    steps = list_steps(workdir)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"step {step}"
        raise FileNotFoundError(f"{workdir} has not {wanted}; its steps are {steps}")
    problems = []
    for candidate in reversed(steps) if step is None else [step]:
        path = workdir / CHECKPOINTS / str(candidate)
        try:
            return _load_step(path, part, ema, shardings)
        except CorruptStepError as error:
            problems.append(f"step {candidate}: {error}")
            if step is None:
                log.warning("checkpoint %s is corrupt: %s. Trying an older step", path, error)
    raise CorruptStepError(f"{workdir} has no good checkpoint to load: {shorten(problems)}")


def _load_step(path: epath.Path, part: str, ema: bool, shardings: Any) -> LoadedParams:
    manifest = manifests.read_manifest(path)
    full_names = _full_names(manifest, "params", part)
    if ema:  # the average is of what was trained; the rest is as ever
        full_names |= _full_names(manifest, "ema_params", part)
    wanted = _targets(
        {name: manifest["arrays"][full] for name, full in full_names.items()}, shardings
    )
    with local_copy(path) as copy:
        # All files, though the parameters fill a part of them: whoever trusts these parameters
        # trusts the step, and should hear that something of it is damaged.
        problems = manifests.check_files(copy, manifest)
        if problems:
            raise CorruptStepError(shorten(problems))
        read = read_arrays(copy, {full: wanted[name] for name, full in full_names.items()})
    digests = array_digests(read)
    problems = manifests.check_arrays(manifest, digests)
    if problems:
        raise CorruptStepError(shorten(problems))
    return LoadedParams(
        nest({name: read[full] for name, full in full_names.items()}),
        manifest["step"],
        combine_digests({name: digests[full] for name, full in full_names.items()}),
    )


def _full_names(manifest: dict[str, Any], subtree: str, part: str) -> dict[str, str]:
    """Return {path below the subtree's part: path in the state}.

    Raises:
      ValueError: there is nothing.
    """
    prefix = "/".join(filter(None, (subtree, part))) + "/"
    found = {full[len(prefix) :]: full for full in manifest["arrays"] if full.startswith(prefix)}
    if not found:
        top = sorted({name.split("/")[0] for name in manifest["arrays"]})
        raise ValueError(f"step {manifest['step']} holds no {prefix.rstrip('/')}; it holds {top}")
    return found


def _targets(stored: dict[str, Any], shardings: Any = None) -> dict[str, Any]:
    """Return what each stored array is to become: NumPy on the host, or placed by a sharding."""
    if shardings is None:
        # A zero-stride view: it tells shape and type and holds no memory.
        return {
            name: np.broadcast_to(np.zeros((), x["dtype"]), x["shape"])
            for name, x in stored.items()
        }
    if isinstance(shardings, jax.sharding.Sharding):
        by_name = dict.fromkeys(stored, shardings)
    else:
        by_name = named_leaves(shardings)
    missing = [name for name in stored if name not in by_name]
    if missing or len(by_name) != len(stored):
        raise ValueError(
            f"shardings name {len(by_name)} arrays and the checkpoint holds {len(stored)}"
            + (f"; there is none for {shorten(missing)}" if missing else "")
        )
    return {
        name: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"], sharding=by_name[name])
        for name, x in stored.items()
    }


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What an audit found of one step; without problems it is good to the bit."""

    step: int
    num_files: int
    num_arrays: int
    num_bytes: int
    problems: tuple[str, ...]


def verify(workdir: epath.PathLike) -> list[StepReport]:
    """Re-read every byte and array of every step of a workdir and report what is wrong."""
    workdir = absolute(workdir)
    rows = {row["step"]: row for row in manifests.read_ledger(workdir)}
    directory = workdir / CHECKPOINTS
    return [_verify_step(directory / str(step), rows.get(step)) for step in step_numbers(directory)]


def _verify_step(path: epath.Path, ledger_row: dict[str, Any] | None) -> StepReport:
    try:
        manifest = manifests.read_manifest(path)
    except CorruptStepError as error:
        return StepReport(int(path.name), 0, 0, 0, (str(error),))
    with local_copy(path) as copy:
        problems = manifests.check_files(copy, manifest)
        if not problems:
            # One array at a time: an audit should not need the memory of a whole state.
            for name, wanted in _targets(manifest["arrays"]).items():
                try:
                    read = read_arrays(copy, {name: wanted})
                except CorruptStepError as error:
                    problems.append(str(error))
                    continue
                problems += manifests.check_arrays(manifest, array_digests(read))
    if ledger_row is not None:
        expected = manifests.ledger_row(manifest)
        problems += [
            f"the ledger says {field} {ledger_row.get(field)}, the manifest {value}"
            for field, value in expected.items()
            if ledger_row.get(field) != value
        ]
    num_bytes = sum(file["bytes"] for file in manifest["files"].values())
    return StepReport(
        int(path.name), len(manifest["files"]), len(manifest["arrays"]), num_bytes, tuple(problems)
    )
