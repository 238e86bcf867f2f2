"""Run many members of one stage that differ in some fields, and report which was best.

    python -m experiments.sweep --config=configs/sweep_tiny.py --workdir=runs/sweep [--dry_run]

A sweep is a recipe (configs/sweep_tiny.py): fields and values, and where its members run: on this
machine, as a SLURM array, or on a cloud by SkyPilot. Called again it goes on with members that are
not finished, --retry_failed with those that failed elsewhere for all their retries, too;
--report_only reads what there is.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from configs.schema import SweepConfig
from experiments import entry
from experiments.sweep_cost import listing
from experiments.sweep_members import SweepMember, record_sweep, resolve
from experiments.sweep_report import write_sweep_report
from experiments.sweep_results import check_metric, decide, forget_rungs, read_results
from experiments.workdir_flag import WORKDIR
from llm.launch.halving import rungs
from llm.launch.jobs import Executor, Job
from llm.launch.local import LocalExecutor
from llm.launch.skypilot import SkyPilotExecutor
from llm.launch.slurm import SlurmExecutor
from llm.parallel.mesh import ALONE
from llm.training.files import absolute, is_local
from llm.training.lock import Lock

_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "List the members with their cost, and stop.")
_RETRY_FAILED = flags.DEFINE_boolean(
    "retry_failed", False, "Start members again that have used up their retries (slurm, skypilot)."
)
_REPORT_ONLY = flags.DEFINE_boolean("report_only", False, "Start nothing; report what there is.")

_HOUSE = pathlib.Path(__file__).resolve().parent.parent
_CARRIED = "~/carried"  # on a slice: a recipe that is not in the checkout


def main(sweep: SweepConfig) -> None:
    jax.config.update("jax_platforms", "cpu")  # the accelerators are the members'
    members = resolve(sweep)
    workdir = absolute(WORKDIR.value)
    if _DRY_RUN.value:
        executor = make_executor(sweep, members, workdir)
        print(listing(sweep, members))
        first = next(iter(rungs_of(sweep, members)), 0)
        print(executor.describe([job_of(sweep, member, workdir, first) for member in members]))
        return
    over, told = _REPORT_ONLY.value, {}
    if not over:
        executor = make_executor(sweep, members, workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir)
        lock.acquire()
        try:
            print(record_sweep(workdir, sweep, members))
            over = run_members(sweep, members, workdir, executor)
            told = executor.failed
        finally:
            lock.release()

    results = read_results(workdir, sweep, members, told)
    check_metric(results, sweep.metric)
    write_sweep_report(workdir, sweep, results)
    failed = [result for result in results if result.state.startswith("failed")]
    for result in failed:
        print(f"{result.member.name}: {result.state}; {workdir / result.member.name}")
    if not over:
        print("members are on their way: the same command tells how they stand, and goes on")
    print(f"report: {workdir / 'report.html'} (and report.md, members.csv)")
    if failed and over and not _REPORT_ONLY.value:
        raise MembersFailedError(f"{len(failed)} of {len(members)} members failed")


class MembersFailedError(RuntimeError):
    """Some members have not reached their end, in spite of all starts."""


def run_members(
    sweep: SweepConfig, members: Sequence[SweepMember], workdir: epath.Path, executor: Executor
) -> bool:
    """Run the members, from rung to rung where the sweep has any; return whether all are over."""
    alive = list(members)
    if sweep.halving is None:
        forget_rungs(workdir)
    for step in rungs_of(sweep, members):
        if not executor.run([job_of(sweep, member, workdir, step) for member in alive]):
            return False
        alive = decide(workdir, sweep, alive, step)
        print(f"step {step}: {len(alive)} go on: {'; '.join(member.name for member in alive)}")
    return executor.run([job_of(sweep, member, workdir) for member in alive])


def rungs_of(sweep: SweepConfig, members: Sequence[SweepMember]) -> Sequence[int]:
    """Return the steps at which hopeless members end."""
    lengths = [member.total_steps for member in members]
    return rungs(sweep.halving, None if None in lengths else max(lengths))


def make_executor(
    sweep: SweepConfig, members: Sequence[SweepMember], workdir: epath.Path
) -> Executor:
    """Return where the sweep's members run.

    Raises:
      ValueError: members cannot be kept in such a workdir there.
    """
    shared = is_local(workdir)
    if sweep.executor == "skypilot":
        if shared and not _DRY_RUN.value:
            raise ValueError(
                f"workdir={workdir}: members of executor=skypilot run on other machines; give a "
                "bucket, gs://… or s3://…"
            )
        recipes = {pathlib.Path(member.recipe.partition(":")[0]) for member in members}
        carried = {f"{_CARRIED}/{r.name}": str(r) for r in recipes if not _in_checkout(r)}
        again = _RETRY_FAILED.value
        return SkyPilotExecutor(sweep.skypilot, _HOUSE, carried, retry_failed=again)
    if not shared:
        raise ValueError(
            f"workdir={workdir}: executor={sweep.executor} keeps its logs beside the members; give "
            "a directory"
        )
    if sweep.executor == "slurm":
        return SlurmExecutor(sweep.slurm, workdir, retry_failed=_RETRY_FAILED.value)
    return LocalExecutor(sweep.local, metric=sweep.metric)


def job_of(
    sweep: SweepConfig, member: SweepMember, workdir: epath.Path, stop_at_step: int = 0
) -> Job:
    """Return the command that runs a member, up to a step where one is given."""
    file, _, argument = member.recipe.partition(":")
    python, alone = sys.executable, ()
    if sweep.executor == "skypilot":
        python = "python"
        file = file if _in_checkout(pathlib.Path(file)) else f"{_CARRIED}/{os.path.basename(file)}"
    elif os.path.exists(file):
        file = os.path.abspath(file)
    if sweep.executor == "local":
        alone = (f"--process={ALONE}",)
    stop = (f"--config.run.stop_at_step={stop_at_step}",) if stop_at_step else ()
    command = (
        *(python, "-m", f"experiments.{sweep.stage}"),
        f"--config={file}{':' if argument else ''}{argument}",
        f"--workdir={workdir / member.name}",
        *(f"--config.{override.path}={override.text}" for override in member.overrides),
        *stop,
        *alone,
    )
    return Job(member.name, command, workdir / member.name, stop_at_step)


def _in_checkout(recipe: pathlib.Path) -> bool:
    """Return whether a recipe is found from the checkout's root by the path given."""
    return not recipe.is_absolute() and (_HOUSE / recipe).is_file()


if __name__ == "__main__":
    entry.run(main, SweepConfig)
