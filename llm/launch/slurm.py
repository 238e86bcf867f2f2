"""Jobs as one SLURM array. Third floor.

Before its time limit a job is told to save; it leaves with 75 and is put back in the queue.
"""

import re
import shlex
import shutil
import subprocess
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llm.launch.config import SlurmConfig
from llm.launch.jobs import (
    GO_ON,
    LOG,
    STARTS,
    USER_ERROR,
    Job,
    LaunchError,
    is_done,
    read_starts,
)
from llm.training.files import absolute, append_json_line, read_json_lines, write_atomically

_SUBMITTED = "submitted.jsonl"  # {"job": id, "members": [[name, stop_at_step], ...]} a line

# `--signal` without B: reaches the steps, which are the members, and not this script. Cores a task
# are said to srun too, which since SLURM 22.05 does not take them over from sbatch.
_SCRIPT = """#!/bin/bash
{directives}
folder=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {lists}.folders)
command=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {lists}.commands)
starts=${{SLURM_RESTART_COUNT:-0}}
began=$(date +%s)
{setup}
srun --kill-on-bad-exit=1{step} bash -c "exec $command" >> "$folder/{log}" 2>&1
code=$?
printf '{{"time":"%s","stop_at_step":{stop_at_step},"exit_code":%d,"seconds":%d}}\\n' \\
  "$(date -Iseconds)" "$code" "$(($(date +%s) - began))" >> "$folder/{starts}"
if [ "$code" -ne 0 ] && [ "$code" -ne {user_error} ] && [ "$starts" -lt {retries} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


class SlurmExecutor:
    """See SlurmConfig. `folder` is on a file system that the nodes share; it keeps the scripts.

    With `retry_failed` jobs that have failed as often as they may are submitted once more.
    """

    failed: Mapping[str, str] = types.MappingProxyType({})  # starts are recorded

    def __init__(self, config: SlurmConfig, folder: epath.Path, *, retry_failed: bool = False):
        self._config, self._folder = config, absolute(folder) / "slurm"
        self._retry_failed = retry_failed

    def describe(self, jobs: Sequence[Job]) -> str:
        """Return the script that `run` would submit."""
        return self._script(jobs, self._folder / "array-…")

    def run(self, jobs: Sequence[Job]) -> bool:
        """Submit an array of the jobs that are neither over nor in the queue.

        Over are also those that have failed as often as they may.

        Raises:
          FileNotFoundError: there is no sbatch here.
          LaunchError: SLURM refuses, with what it said.
        """
        queued = self._queued()
        left = [job for job in jobs if not is_done(job)]
        others = [job for job in left if [job.name, job.stop_at_step] not in queued]
        new = [job for job in others if self._retry_failed or not self._given_up(job)]
        if new:
            self._submit(new)
        return not new and len(others) == len(left)

    def _given_up(self, job: Job) -> bool:
        codes = [row["exit_code"] for row in read_starts(job.folder)]
        bugs = [code for code in codes if code not in (0, *GO_ON)]
        return codes[-1:] == [USER_ERROR] or len(bugs) > self._config.retries

    def _submit(self, jobs: Sequence[Job]) -> None:
        if shutil.which("sbatch") is None:
            raise FileNotFoundError("there is no sbatch here: start this on a login node of SLURM")
        self._folder.mkdir(parents=True, exist_ok=True)
        lists = self._folder / f"array-{time.time_ns()}"
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
        folders = "".join(f"{absolute(job.folder)}\n" for job in jobs)
        write_atomically(epath.Path(f"{lists}.folders"), folders)
        commands = "".join(f"{shlex.join(job.command)}\n" for job in jobs)
        write_atomically(epath.Path(f"{lists}.commands"), commands)
        script = epath.Path(f"{lists}.sh")
        write_atomically(script, self._script(jobs, lists))
        said = _ask("sbatch", "--parsable", str(script))
        number = said.strip().split(";")[0]  # "id" or "id;cluster"
        members = [[job.name, job.stop_at_step] for job in jobs]
        append_json_line(self._folder / _SUBMITTED, {"job": number, "members": members})
        print(f"submitted {len(jobs)} members as SLURM job {number} ({script})")

    def _queued(self) -> list[list[Any]]:
        """Return the members that wait or run in arrays of ours, and up to which step."""
        members = {row["job"]: row["members"] for row in read_json_lines(self._folder / _SUBMITTED)}
        if not members:
            return []
        # All of the user's jobs, by array and index: an id that is forgotten would be an error.
        asked = _ask("squeue", "--me", "--noheader", "--array", "--format=%F %K")
        places = [line.split() for line in asked.splitlines()]
        return [
            members[job][int(index)]
            for job, index in places
            if job in members and index.isdecimal()
        ]

    def _script(self, jobs: Sequence[Job], lists: epath.Path) -> str:
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {each}" for each in self._directives(jobs, lists)),
            lists=shlex.quote(str(lists)),
            setup=self._config.setup,
            step=f" --cpus-per-task={cores}" if (cores := self._config.cpus_per_task) else "",
            log=LOG,
            starts=STARTS,
            stop_at_step=jobs[0].stop_at_step,
            user_error=USER_ERROR,
            retries=self._config.retries,
        )

    def _directives(self, jobs: Sequence[Job], lists: epath.Path) -> list[str]:
        config = self._config
        most = f"%{config.parallel}" if config.parallel else ""
        given = {
            "--job-name": re.sub(r"[^\w.-]+", "-", self._folder.parent.name),
            "--array": f"0-{len(jobs) - 1}{most}",
            "--output": shlex.quote(f"{lists}-%a.log"),
            "--partition": config.partition,
            "--account": config.account,
            "--time": config.time_limit,
            "--nodes": config.nodes,
            "--ntasks-per-node": config.tasks_per_node,
            "--gpus-per-node": config.gpus_per_node,
            "--cpus-per-task": config.cpus_per_task,
            "--signal": f"TERM@{config.signal_seconds}",
        }
        named = [f"{name}={value}" for name, value in given.items() if value]
        return [*named, "--requeue", "--open-mode=append", *config.directives]


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"{command[0]} refused ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
