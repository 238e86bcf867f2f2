"""Tasks that SkyPilot's own schema accepts, and its validation against a small catalog.

Catalog, quota and price of a real cloud are not looked at: there is none here.
"""

import importlib.util
import inspect
import pathlib
import shlex
import subprocess
import sys

import pytest
from etils import epath

from llm.launch.config import SkyPilotConfig
from llm.launch.jobs import Job, LaunchError, record_start
from llm.launch.skypilot import SkyPilotExecutor

HOUSE = pathlib.Path(__file__).resolve().parents[2]
# As SkyPilot's fetcher lays them out: columns of catalog schema v8, one zone, made-up prices.
TPUS = "tpu-v4-8 tpu-v5litepod-8 tpu-v5litepod-16 tpu-v5p-128 tpu-v6e-256".split()
HEADER = (
    "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,"
    "Price,SpotPrice,Region,AvailabilityZone"
)


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """SkyPilot in a home of its own with a catalog of a few accelerators."""
    if importlib.util.find_spec("sky") is None:
        pytest.skip("skypilot, the extra `launch`, is not installed")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("SKY_RUNTIME_DIR", str(home))
        patch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
        import sky
        from sky.catalog import common

        folder = pathlib.Path(common.get_catalog_path("gcp"))
        assert home in folder.parents, "sky was imported with another home"
        folder.mkdir(parents=True)
        rows = [f",,,{name},1,,10.0,4.0,us-east5,us-east5-a" for name in TPUS]
        rows.append("a3-highgpu-8g,208,1872,H100,8,,80.0,20.0,us-east5,us-east5-a")
        (folder / "vms.csv").write_text("\n".join([HEADER, *rows]) + "\n")
        names = "".join(f"{name},GCP,,\n" for name in [*TPUS, "H100"])
        (folder.parent / "common").mkdir()
        accelerators = "AcceleratorName,Clouds,MemoryGiB,GPU Model\n" + names
        (folder.parent / "common" / "accelerators.csv").write_text(accelerators)
        yield sky


def jobs_of(count, bucket="gs://bucket/sweep"):
    return [
        Job(
            f"learning_rate={0.1 * (i + 1):.1f},name=muon",
            ("python", "-m", "experiments.pretrain", f"--workdir={bucket}/lr={i}", "--x=a b"),
            epath.Path(f"{bucket}/lr={i}"),
        )
        for i in range(count)
    ]


CONFIGS = [
    SkyPilotConfig(slice="v5e-8", infra="gcp/us-east5"),
    SkyPilotConfig(slice="v5e-16", infra="gcp/us-east5/us-east5-a", members_per_task=3),
    SkyPilotConfig(slice="v5p-128", use_spot=False, env={"HF_TOKEN": "x"}),
    SkyPilotConfig(slice="v6e-256", runtime_version="v2-alpha-tpuv6e"),
    SkyPilotConfig(slice="v4-8", extras=("huggingface",)),
    SkyPilotConfig(slice="H100:8", infra="gcp"),
    SkyPilotConfig(slice="H100:8", nodes=4, infra="gcp"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.slice}x{config.nodes}")
def test_skypilot_accepts_and_validates_the_tasks(sky, config):
    executor = SkyPilotExecutor(config, HOUSE)
    tasks = executor.task_configs(jobs_of(5))
    assert len(tasks) == (2 if config.members_per_task == 3 else 5)
    assert len({task["name"] for task in tasks}) == len(tasks)
    task = sky.Task.from_yaml_config(tasks[0])
    task.validate()
    (resources,) = task.resources
    assert resources.use_spot == config.use_spot
    # what a job is recovered after, besides preemptions: told to leave; a peer lost
    assert resources.job_recovery["recover_on_exit_codes"] == [75, 76]
    assert task.num_nodes == (config.nodes if config.slice.startswith("H100") else 1)


def test_the_schema_and_the_catalog_refuse_what_is_not(sky):
    config = SkyPilotExecutor(SkyPilotConfig(), HOUSE).task_configs(jobs_of(1))[0]
    with pytest.raises(ValueError, match="Invalid task YAML"):
        sky.Task.from_yaml_config(config | {"acelerators": "x"})
    for infra in ("gcp/us-nowhere1", "aws"):
        elsewhere = SkyPilotExecutor(SkyPilotConfig(infra=infra), HOUSE).task_configs(jobs_of(1))[0]
        with pytest.raises((ValueError, AssertionError), match="us-nowhere1|Cloud must be GCP"):
            sky.Task.from_yaml_config(elsewhere).validate()


def test_secrets_reach_the_task_and_nothing_that_is_shown_or_kept(sky, monkeypatch):
    config = SkyPilotConfig(secrets=("HF_TOKEN",))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(LaunchError, match="skypilot.secrets: HF_TOKEN is not set"):
        SkyPilotExecutor(config, HOUSE).describe(jobs_of(1))
    monkeypatch.setenv("HF_TOKEN", "hf_1234")
    executor = SkyPilotExecutor(config, HOUSE)
    task = sky.Task.from_yaml_config(executor.task_configs(jobs_of(1))[0])
    assert task.secrets["HF_TOKEN"].get_secret_value() == "hf_1234"
    assert "HF_TOKEN" in executor.describe(jobs_of(1))
    assert "hf_1234" not in executor.describe(jobs_of(1)) + repr(config)


def run_under_stand_ins(sky, monkeypatch):
    """Stand in for the two calls that need a server, bound by the real signatures; return the tasks
    that are launched, and the state of each in the queue. As of a real server without a controller,
    which the first launch makes, the queue of none is an error."""
    launched, states = [], {}

    def launch(*args, **kwargs):
        bound = inspect.signature(real["launch"]).bind(*args, **kwargs).arguments
        launched.append(bound["task"])
        return [len(launched)], None

    def queue(*args, **kwargs):
        inspect.signature(real["queue_v2"]).bind(*args, **kwargs)
        if not launched:
            raise sky.exceptions.ClusterDoesNotExist("Cluster 'sky-jobs-controller' does not exist")
        running = sky.jobs.ManagedJobStatus.RUNNING
        rows = [
            ManagedJobRecord(job_id=i, job_name=t.name, status=states.get(t.name, running))
            for i, t in enumerate(launched)
        ]
        return rows[::-1], len(rows), {}, len(rows)  # the newest first

    from sky.schemas.api.responses import ManagedJobRecord

    real = {"launch": sky.jobs.launch, "queue_v2": sky.jobs.queue_v2}
    monkeypatch.setattr(sky.jobs, "launch", launch)
    monkeypatch.setattr(sky.jobs, "queue_v2", queue)
    monkeypatch.setattr(sky, "get", lambda request: request)
    return launched, states


def test_jobs_are_launched_once(sky, monkeypatch, capsys):
    launched, states = run_under_stand_ins(sky, monkeypatch)
    executor = SkyPilotExecutor(SkyPilotConfig(), HOUSE)
    assert not executor.run(jobs_of(2, "gs-not-there"))
    assert not executor.run(jobs_of(3, "gs-not-there"))
    assert [task.workdir for task in launched] == [str(HOUSE)] * 3
    assert capsys.readouterr().out.count("on its way") == 2
    # one that failed is over; one that was cancelled is launched again
    status = sky.jobs.ManagedJobStatus
    states |= dict(
        zip(
            (t.name for t in launched),
            (status.FAILED, status.CANCELLED, status.RUNNING),
            strict=True,
        )
    )
    assert not executor.run(jobs_of(3, "gs-not-there"))
    assert len(launched) == 4 and launched[3].name == launched[1].name
    assert executor.failed == {jobs_of(3, "gs-not-there")[0].name: "FAILED"}
    states |= dict.fromkeys((task.name for task in launched), status.FAILED)
    assert executor.run(jobs_of(3, "gs-not-there"))
    # asked to, they are tried again, and then are on their way
    again = SkyPilotExecutor(SkyPilotConfig(), HOUSE, retry_failed=True)
    assert not again.run(jobs_of(3, "gs-not-there")) and len(launched) == 7


def test_what_skypilot_refuses_is_one_line(sky, monkeypatch):
    def get(request):
        raise sky.exceptions.NoCloudAccessError("No cloud access.\nRun: \x1b[1msky check\x1b[0m")

    run_under_stand_ins(sky, monkeypatch)
    monkeypatch.setattr(sky, "get", get)
    with pytest.raises(LaunchError, match=r"^SkyPilot: No cloud access\. Run: sky check$"):
        SkyPilotExecutor(SkyPilotConfig(), HOUSE).run(jobs_of(1, "gs-not-there"))


def test_without_skypilot_one_line_tells_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sky", None)  # as where it is not installed
    with pytest.raises(LaunchError, match="constraints-launch.txt"):
        SkyPilotExecutor(SkyPilotConfig(), HOUSE).run(jobs_of(1, "gs-not-there"))


def test_a_task_keeps_its_name_while_some_of_its_members_are_done(sky, monkeypatch, tmp_path):
    launched, _ = run_under_stand_ins(sky, monkeypatch)
    executor = SkyPilotExecutor(SkyPilotConfig(members_per_task=3), HOUSE)
    jobs = jobs_of(3, str(tmp_path))
    assert not executor.run(jobs)
    for job in jobs[:1]:
        job.folder.mkdir()
        record_start(job, 0, 1.0)
    assert not executor.run(jobs)
    assert len(launched) == 1


def test_a_member_that_fails_keeps_no_other_from_running():
    jobs = [
        Job(name, ("bash", "-c", f"echo {name}; exit {code}"), epath.Path(f"gs://b/{name}"))
        for name, code in (("a", 2), ("b", 0), ("c", 75), ("d", 0))
    ]
    (task,) = SkyPilotExecutor(SkyPilotConfig(members_per_task=4), HOUSE).task_configs(jobs)
    script = task["run"].replace(". ~/venv/bin/activate", "true")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == (["a", "b", "c"], 75)  # c is to go on first
    done = subprocess.run(
        ["bash", "-c", script.replace("exit 75", "exit 0")], capture_output=True, text=True
    )
    assert (done.stdout.split(), done.returncode) == (["a", "b", "c", "d"], 2)


def test_gpu_hosts_are_told_which_they_are():
    """The run commands in bash, with the variables that SkyPilot sets on the second host."""
    (task,) = SkyPilotExecutor(SkyPilotConfig(slice="H100:8", nodes=2), HOUSE).task_configs(
        jobs_of(1)
    )
    script = task["run"].replace(
        ". ~/venv/bin/activate || exit", 'python() { printf "%s\\n" "$@"; }'
    )
    env = {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    said = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert said.stdout.splitlines()[-2:] == ["--x=a b", "--process=1/2@10.0.0.1:8476"]
    (task,) = SkyPilotExecutor(SkyPilotConfig(slice="v5p-128"), HOUSE).task_configs(jobs_of(1))
    assert "--process" not in task["run"]  # jax.distributed finds a slice's hosts
    (line,) = (each for each in task["run"].splitlines() if each.startswith("python"))
    assert shlex.split(line.removesuffix(" || {"))[-1] == "--x=a b"


def test_setup_installs_what_the_slice_needs():
    def setup(bucket, **config):
        executor = SkyPilotExecutor(SkyPilotConfig(**config), HOUSE)
        return executor.task_configs(jobs_of(1, bucket))[0]["setup"]

    assert ".[tpu,gcs,huggingface]" in setup("gs://b", extras=("huggingface",))
    assert ".[cuda,s3]" in setup("s3://b", slice="H100:8")
