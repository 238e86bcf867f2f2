"""The array script, read by bash and run under stand-ins for SLURM's commands."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from etils import epath

from llm.launch.config import SlurmConfig
from llm.launch.jobs import LOG, Job, LaunchError, read_starts
from llm.launch.slurm import SlurmExecutor

# sbatch runs every index at once, again where the script has asked for it, as --requeue allows.
SBATCH = """#!/bin/bash
[ "$1" = --parsable ] || exit 9
script=$2
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_ARRAY_JOB_ID=77
for SLURM_ARRAY_TASK_ID in $(seq 0 "$last"); do
  export SLURM_ARRAY_TASK_ID
  for SLURM_RESTART_COUNT in 0 1 2 3 4 5; do
    export SLURM_RESTART_COUNT
    rm -f requeued; bash "$script" >> slurm.log 2>&1
    [ -e requeued ] || break
  done
done
echo "77;cluster"
"""
SRUN = '#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol.log\ntouch requeued\n'
SQUEUE = "#!/bin/bash\n[ ! -e queue ] || cat queue\n"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, text in {
        "sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE,
    }.items():  # fmt: skip
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(folder, name, *command, stop_at_step=0):
    return Job(name, command, epath.Path(folder) / name, stop_at_step)


# Exits with its arguments, one after the other, a start each.
COUNTS = (
    "import sys, pathlib; p = pathlib.Path(sys.argv[1]); n = int(p.read_text()) if p.exists() "
    "else 0; p.write_text(str(n + 1)); print('start', n); sys.exit(int(sys.argv[2 + n]))"
)


def counting(folder, name, *codes):
    file = str(pathlib.Path(folder) / f"{name}.count")
    return job(folder, name, sys.executable, "-S", "-c", COUNTS, file, *map(str, codes))


def test_members_run_and_are_put_back_in_the_queue(cluster, capfd):
    folder = epath.Path(cluster / "a sweep")
    jobs = [
        counting(cluster, "lr=1,x=$HOME 'q'", 75, 76, 0),  # time limit, a peer lost, the end
        counting(cluster, "b", 2, 0),  # something to mend: not tried again
        counting(cluster, "c", *[1] * 6),  # a bug, as often as retries allow
    ]
    executor = SlurmExecutor(SlurmConfig(retries=2), folder)
    assert not executor.run(jobs)
    codes = [[row["exit_code"] for row in read_starts(each.folder)] for each in jobs]
    assert codes == [[75, 76, 0], [2], [1, 1, 1]], (cluster / "slurm.log").read_text()
    assert (jobs[0].folder / LOG).read_text() == "start 0\nstart 1\nstart 2\n"
    assert (cluster / "scontrol.log").read_text() == "requeue 77_0\n" * 2 + "requeue 77_2\n" * 2
    assert "submitted 3 members as SLURM job 77" in capfd.readouterr().out
    # what has failed for good is over; nothing is submitted again
    assert executor.run(jobs)
    assert "submitted" not in capfd.readouterr().out
    # asked to, it is tried again, those that are done left alone
    again = SlurmExecutor(SlurmConfig(retries=2), folder, retry_failed=True)
    assert not again.run(jobs)
    assert "submitted 2 members" in capfd.readouterr().out
    assert [[row["exit_code"] for row in read_starts(each.folder)] for each in jobs[1:]] == [
        [2, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert executor.run(jobs)


def test_what_has_failed_and_is_tried_again_is_on_its_way(cluster):
    folder, jobs = epath.Path(cluster / "sweep"), [counting(cluster, "a", 2)]
    assert not SlurmExecutor(SlurmConfig(), folder).run(jobs)
    assert SlurmExecutor(SlurmConfig(), folder).run(jobs)
    (cluster / "bin" / "sbatch").write_text("#!/bin/bash\necho 78\n")
    assert not SlurmExecutor(SlurmConfig(), folder, retry_failed=True).run(jobs)
    (cluster / "queue").write_text("78 0\n")
    assert not SlurmExecutor(SlurmConfig(), folder).run(jobs)


def test_what_is_queued_is_not_submitted_again(cluster, capfd):
    (cluster / "bin" / "sbatch").write_text("#!/bin/bash\necho 78\n")
    executor = SlurmExecutor(SlurmConfig(), epath.Path(cluster / "sweep"))
    jobs = [job(cluster, "a", "true"), job(cluster, "b", "true")]
    assert not executor.run(jobs)
    assert "submitted 2" in capfd.readouterr().out
    # b waits, beside another array of the user's; a is gone, unfinished
    (cluster / "queue").write_text("78 1\n12 [0-3]\n")
    assert not executor.run(jobs)
    assert "submitted 1 members" in capfd.readouterr().out
    # where SLURM cannot be asked nothing is taken for granted
    (cluster / "bin" / "squeue").write_text("#!/bin/bash\necho timed out >&2\nexit 1\n")
    with pytest.raises(LaunchError, match="squeue refused .1.: timed out"):
        executor.run(jobs)


@pytest.mark.parametrize(
    "config",
    [
        SlurmConfig(),
        SlurmConfig(
            parallel=4, partition="gpu", account="lab", time_limit="1-0:0:0", nodes=2,
            gpus_per_node=8, tasks_per_node=8, cpus_per_task=8, setup="module load cuda",
            directives=("--constraint=h100",),
        ),
    ],
)  # fmt: skip
def test_bash_reads_the_script(config, tmp_path):
    jobs = [job(tmp_path, f"m{i}", "true") for i in range(8)]
    script = SlurmExecutor(config, epath.Path(tmp_path / "it's")).describe(jobs)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    assert "--array=0-7%4" in lines if config.parallel else "--array=0-7" in lines
    assert {"--requeue", "--signal=TERM@120", "--job-name=it-s"} <= set(lines)
    if config.partition:
        # srun's own: since SLURM 22.05 it does not inherit it (its release notes)
        assert "\nsrun --kill-on-bad-exit=1 --cpus-per-task=8 bash -c" in script
        assert {"--gpus-per-node=8", "--ntasks-per-node=8", "--constraint=h100"} <= set(lines)
        assert not any(line.startswith("--gpus-per-task") for line in lines)
    assert [shlex.split(line) for line in lines if "--output" in line] == [
        [f"--output={tmp_path}/it's/slurm/array-…-%a.log"]
    ]


def test_one_process_for_all_gpus_is_refused():
    with pytest.raises(ValueError, match="set it to gpus_per_node=8"):
        SlurmConfig(gpus_per_node=8)


def test_without_slurm_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no sbatch here"):
        SlurmExecutor(SlurmConfig(), epath.Path(tmp_path)).run([job(tmp_path, "a", "true")])
