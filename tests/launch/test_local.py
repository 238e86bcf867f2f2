"""Members as processes: so many at a time, on their cores, again after a failure, stopped whole."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from llm.launch.config import LocalConfig
from llm.launch.jobs import LOG, Job, is_done, read_starts, tail
from llm.launch.local import LocalExecutor, make_slots
from llm.training.metrics import encode

# Ends when it, or an earlier one, has seen another beside it.
SEEN = """
import json, os, pathlib, time
begin = time.monotonic()
(pathlib.Path({folder!r}) / str(os.getpid())).touch()
while len(os.listdir({folder!r})) < 2 and time.monotonic() - begin < 60:
    time.sleep(0.01)
print(json.dumps({{"cores": sorted(os.sched_getaffinity(0)), "begin": begin,
                  "end": time.monotonic(), "omp": os.environ.get("OMP_NUM_THREADS"),
                  "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}}))
"""


def jobs_of(folder, *programs):
    return [
        Job(f"m{i}", (sys.executable, "-S", "-c", program), epath.Path(folder) / f"m{i}")
        for i, program in enumerate(programs)
    ]


def codes(job):
    return [row["exit_code"] for row in read_starts(job.folder)]


def test_two_at_a_time_each_on_its_cores_and_gpus(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    (tmp_path / "seen").mkdir()
    jobs = jobs_of(tmp_path, *[SEEN.format(folder=str(tmp_path / "seen"))] * 5)
    assert LocalExecutor(LocalConfig(parallel=2, cuda_devices=("0,1", "2,3"))).run(jobs)
    found = [json.loads(tail(job.folder)) for job in jobs]
    for each in found:
        others = [x for x in found if x["begin"] < each["end"] and each["begin"] < x["end"]]
        assert len(others) <= 2  # itself counted
        assert len({tuple(x["cores"]) for x in others}) == len(others)
        assert len(each["cores"]) == len(cores) // 2 == int(each["omp"])
    assert any(a["begin"] < b["begin"] < a["end"] for a in found for b in found)
    assert {each["cuda"] for each in found} == {"0,1", "2,3"}
    assert sorted(os.sched_getaffinity(0)) == cores  # ours are as they were
    assert all(map(is_done, jobs))


def test_shares_of_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8, 9, 10})
    assert [slot.cores for slot in make_slots(LocalConfig(parallel=3))] == [(0, 1), (2, 3), (8, 9)]
    assert [slot.cores for slot in make_slots(LocalConfig(parallel=9, pin_cores=False))] == [()] * 9
    with pytest.raises(ValueError, match="local.parallel=8: there are 7 cores"):
        LocalExecutor(LocalConfig(parallel=8))


def test_a_failure_is_tried_again_and_a_mistake_is_not(tmp_path, capsys):
    fails = (
        "import sys, pathlib; p = pathlib.Path({!r}); n = len(p.read_text()) if p.exists() else 0;"
    )
    fails += "p.write_text('x' * (n + 1)); print('start', n); sys.exit(0 if n >= {} else {})"
    mends = fails.format(str(tmp_path / "mends"), 2, 1)  # a bug twice, then well
    never = fails.format(str(tmp_path / "never"), 99, 1)
    user = fails.format(str(tmp_path / "user"), 99, 2)
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    jobs = jobs_of(tmp_path, mends, never, user, killed)
    assert LocalExecutor(LocalConfig(retries=2)).run(jobs)
    assert [codes(job) for job in jobs] == [[1, 1, 0], [1, 1, 1], [2], [-9, -9, -9]]
    assert tail(jobs[0].folder) == "start 0\nstart 1\nstart 2"
    said = capsys.readouterr().err
    assert "m2: something to mend (exit code 2)" in said and "m3: killed by signal 9" in said
    # called again: what is done is left alone, the others are tried again
    LocalExecutor(LocalConfig(retries=0)).run(jobs)
    assert [len(codes(job)) for job in jobs] == [3, 4, 2, 4]


DRIVER = """
import sys
from etils import epath
from llm.launch.config import LocalConfig
from llm.launch.jobs import Job
from llm.launch.local import LocalExecutor
folder = epath.Path({folder!r})
jobs = [Job(f"m{{i}}", (sys.executable, "-S", "-c", {member!r}), folder / f"m{{i}}")
        for i in range(3)]
LocalExecutor(LocalConfig(parallel=2, pin_cores=False)).run(jobs)
"""
SAVES = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
DEAF = SAVES.replace("sys.exit(75)", "")


def stop(folder, member, number, times):
    """Start three members, two at a time, and send the executor a signal when two are ready."""
    program = DRIVER.format(folder=str(folder), member=member)
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    logs = [folder / f"m{i}" / LOG for i in range(2)]
    wait(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
    child.send_signal(number)
    for _ in range(times - 1):
        wait(lambda: all("saved" in log.read_text() for log in logs))
        child.send_signal(number)
    said = child.communicate(timeout=60)[1]
    return child.returncode, said, [log.read_text() for log in logs]


def wait(ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_save_and_starts_no_more(tmp_path, number):
    code, said, logs = stop(tmp_path, SAVES, number, 1)
    assert code == 75 and all(log.endswith("saved\n") for log in logs), said
    assert "stopping: m0, m1" in said and not (tmp_path / "m2").exists()
    assert "told to leave, saved" in said


def test_a_second_one_ends_what_does_not_leave(tmp_path):
    code, said, logs = stop(tmp_path, DEAF, signal.SIGINT, 2)
    assert code == 130 and "killed: m0, m1" in said
    assert [row["exit_code"] for row in read_starts(epath.Path(tmp_path / "m0"))] == [-9]


class ClosedStream:
    """A terminal that goes away."""

    def __init__(self, until):
        self.until = until

    def write(self, text):
        wait(self.until)
        raise OSError("no such device")

    def flush(self):
        pass


def test_members_save_and_leave_when_the_executor_fails(tmp_path):
    (job,) = jobs_of(tmp_path, SAVES)
    log = tmp_path / "m0" / LOG
    stream = ClosedStream(lambda: log.exists() and "ready" in log.read_text())
    with pytest.raises(OSError, match="no such device"):
        LocalExecutor(LocalConfig(pin_cores=False), stream=stream).run([job])
    wait(lambda: "saved" in log.read_text())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_member_that_diverges_is_shown_as_any_other(tmp_path, capsys):
    (job,) = jobs_of(tmp_path, "print('hello')")
    job.folder.mkdir()
    with (job.folder / "metrics.jsonl").open("w") as file:
        file.write(
            json.dumps({"step": 7, "train/loss": encode(math.nan), "eval/x": encode(math.inf)})
        )
    LocalExecutor(LocalConfig(pin_cores=False), metric="eval/x").run([job])
    assert "step 7, loss nan, eval/x inf" in capsys.readouterr().err


def test_a_terminal_gets_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    (job,) = jobs_of(tmp_path, "print('hello')")
    job.folder.mkdir()
    # an evaluation's line has no training loss; the last line is torn
    lines = '{"step":7,"train/loss":2.5}\n{"step":8,"eval/all/loss":3.5}\n{"step":9,"tr'
    (job.folder / "metrics.jsonl").write_text(lines)
    stream = Terminal()
    LocalExecutor(LocalConfig(pin_cores=False), metric="eval/all/loss", stream=stream).run([job])
    last = stream.getvalue().rpartition("member")[2]
    assert all(
        text in last for text in ("m0", "done after 0 s", "step 8, loss 2.5, eval/all/loss 3.5")
    )
