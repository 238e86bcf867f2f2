"""Jobs as SkyPilot's managed jobs, on TPU VM slices or GPU hosts of a cloud. Third floor.

A task carries the code along, installs it and starts members whose workdirs lie in a bucket; when a
spot slice is taken away SkyPilot finds another, where the same command goes on.
"""

import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import rich.text

from llm.launch.config import SkyPilotConfig
from llm.launch.jobs import GO_ON, Job, LaunchError, is_done
from llm.launch.slices import find_slice
from llm.training.files import text_digest

_PORT = 8476  # of process 0, on several GPU hosts
_SETUP = """set -e
[ -d ~/venv ] || uv venv --python 3.11 --seed ~/venv
. ~/venv/bin/activate
pip install --quiet -c constraints.txt -e '.[{extras}]'
"""

# A member that fails keeps none of its task from running; one that is to go on does so first.
_RUN = """{command} || {{
  code=$?
  case $code in {go_on}) exit $code ;; esac
  worst=$code
}}
"""


class SkyPilotExecutor:
    """See SkyPilotConfig.

    `source` is the checkout that is copied to the slice, `files` further local files by where they
    are to lie there. With `retry_failed` tasks that failed, for all their retries, are launched
    once more.
    """

    def __init__(
        self,
        config: SkyPilotConfig,
        source: pathlib.Path,
        files: dict[str, str] | None = None,
        *,
        retry_failed: bool = False,
    ):
        self._config, self._source, self._files = config, source, files or {}
        self._retry_failed = retry_failed
        self._slice = find_slice(config.slice)
        self.failed: dict[str, str] = {}

    def task_configs(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Return the tasks of the jobs, as a YAML file of SkyPilot's would hold them."""
        return [self._task(group) for group in self._grouped(jobs)]

    def describe(self, jobs: Sequence[Job]) -> str:
        """Return how many tasks there are, and the first as `sky jobs launch` takes it: YAML, of
        which JSON is a part."""
        tasks = self.task_configs(jobs)
        first = tasks[0] | {"secrets": dict.fromkeys(self._config.secrets, "…")}
        return f"tasks: {len(tasks)}, the first:\n{json.dumps(first, indent=1)}"

    def run(self, jobs: Sequence[Job]) -> bool:
        """Launch a managed job for each task that is not on its way.

        Over are also tasks that have failed, for all their retries.

        Raises:
          LaunchError: SkyPilot is not installed, or refuses, with what it said.
        """
        try:
            import sky
        except ImportError as error:
            raise LaunchError(
                'executor="skypilot" needs the package skypilot, in an environment of its own: '
                "pip install -c constraints-launch.txt -e '.[launch]'"
            ) from error
        self.failed = {}
        # Grouped first: a task keeps its name while some of its jobs are done and others are not.
        left = [group for group in self._grouped(jobs) if not all(map(is_done, group))]
        on_their_way, states = False, _states(sky) if left else {}
        for group in left:
            task = sky.Task.from_yaml_config(self._task(group))
            state = states.get(task.name)
            if state is not None and state.is_failed() and not self._retry_failed:
                print(f"{task.name}: {state.value}; see `sky jobs logs`")
                self.failed |= {job.name: state.value for job in group if not is_done(job)}
                continue
            on_their_way = True
            if state is not None and not state.is_terminal():
                print(f"{task.name}: on its way")
                continue
            (number,), _ = _ask(sky, sky.jobs.launch, task, name=task.name)
            print(f"{task.name}: managed job {number}")
        return not on_their_way

    def _grouped(self, jobs: Sequence[Job]) -> list[Sequence[Job]]:
        each = self._config.members_per_task
        return [jobs[i : i + each] for i in range(0, len(jobs), each)]

    def _task(self, jobs: Sequence[Job]) -> dict[str, Any]:
        config, found = self._config, self._slice
        resources: dict[str, Any] = {
            "accelerators": found.accelerators,
            "use_spot": config.use_spot,
            "disk_size": config.disk_gigabytes,
            "job_recovery": {
                "max_restarts_on_errors": config.retries,
                "recover_on_exit_codes": list(GO_ON),
            },
        }
        if config.infra:
            resources["infra"] = config.infra
        if found.runtime_version is not None:
            version = config.runtime_version or found.runtime_version
            resources["accelerator_args"] = {"tpu_vm": True, "runtime_version": version}
        device = "tpu" if found.runtime_version else "cuda"
        store = "s3" if str(jobs[0].folder).startswith("s3://") else "gcs"
        return {
            "name": _task_name(jobs),
            "workdir": str(self._source),
            "num_nodes": 1 if found.runtime_version else config.nodes,
            "resources": resources,
            "envs": dict(config.env),
            "secrets": {name: _from_environment(name) for name in config.secrets},
            "file_mounts": dict(self._files),
            "setup": _SETUP.format(extras=",".join((device, store, *config.extras))),
            "run": self._commands(jobs),
        }

    def _commands(self, jobs: Sequence[Job]) -> str:
        """Return what each host runs: the members, one after the other.

        On TPU VMs `jax.distributed` finds the hosts; GPU hosts are told, as SkyPilot numbers them.
        """
        told = ""
        if not self._slice.runtime_version and self._config.nodes > 1:
            first = '$(echo "$SKYPILOT_NODE_IPS" | head -n1)'
            told = f' --process="$SKYPILOT_NODE_RANK/$SKYPILOT_NUM_NODES@{first}:{_PORT}"'
        lines = [
            _RUN.format(command=f"{shlex.join(job.command)}{told}", go_on="|".join(map(str, GO_ON)))
            for job in jobs
        ]
        return "".join([". ~/venv/bin/activate || exit\nworst=0\n", *lines, 'exit "$worst"\n'])


def _from_environment(name: str) -> str:
    if name not in os.environ:
        raise LaunchError(f"skypilot.secrets: {name} is not set in this environment; export it")
    return os.environ[name]


def _states(sky: ModuleType) -> dict[str, Any]:
    """Return the ManagedJobStatus of the newest managed job of each name."""
    # Refreshed: a controller that has stopped, idle, is started, for it alone knows who failed.
    try:
        rows, *_ = _ask(sky, sky.jobs.queue_v2, refresh=True)
    except sky.exceptions.ClusterDoesNotExist:
        return {}  # no controller, so nothing was ever launched
    return {row.job_name: row.status for row in sorted(rows, key=lambda row: row.job_id)}


def _ask(sky: ModuleType, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a request of SkyPilot's came to; what it refuses is the user's to mend."""
    try:
        return sky.get(function(*args, **kwargs))
    except sky.exceptions.ClusterDoesNotExist:
        raise
    except Exception as error:
        if type(error).__module__ != sky.exceptions.__name__:
            raise
        told = rich.text.Text.from_ansi(str(error)).plain
        raise LaunchError(f"SkyPilot: {' '.join(told.split())}") from error


def _task_name(jobs: Sequence[Job]) -> str:
    """Return a name as SkyPilot takes them, the same for the same jobs."""
    digest = text_digest("\n".join(f"{j.folder} {j.stop_at_step}" for j in jobs))
    words = re.sub(r"[^a-zA-Z0-9]+", "-", jobs[0].name).strip("-")[:30].strip("-")
    return f"m-{words}-{digest[:8]}".lower()
