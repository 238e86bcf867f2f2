"""Workdirs on an object store that refuses append and rename: what a file system's runs promise."""

import json
import sys
import threading
import time

import pytest
from etils import epath
from flat_store import FlatStore, empty_store
from fsspec.implementations.memory import MemoryFile
from test_run import assert_same_bits, logged
from toy_loop import ToyBatches, run_toy, toy_state, toy_step

from llm.training import appended, lease
from llm.training.checkpoints import CheckpointError
from llm.training.files import absolute, append_json_line, read_json_lines
from llm.training.loading import load_params, verify
from llm.training.lock import Lock, WorkdirInUseError
from llm.training.manifests import list_steps, read_ledger
from llm.training.metrics import MetricsWriter
from llm.training.run import Run
from llm.training.run_config import RunConfig
from llm.training.store_paths import MissingPackageError, StoreError

WORKDIR = "flat://bucket/run"


@pytest.fixture
def store():
    with empty_store() as objects:
        yield objects


@pytest.fixture(autouse=True)
def short_leases(monkeypatch):
    for name, seconds in (("RENEW", 0.05), ("STALE", 0.5), ("SETTLE", 0.02), ("POLL", 0.01)):
        monkeypatch.setattr(lease, f"{'_' * (name == 'POLL')}{name}_SECONDS", seconds)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The state after 12 steps in a local directory, and what they left."""
    workdir = tmp_path_factory.mktemp("unbroken")
    state, _ = run_toy(workdir, 12)
    return state, left_in(workdir)


def left_in(workdir):
    """What a workdir holds but for what a clock decides."""
    ledger = [{k: x for k, x in row.items() if k != "time"} for row in read_ledger(workdir)]
    return ledger, logged(workdir), read_json_lines(epath.Path(workdir) / "texts.jsonl")


def assert_goes_on_as_unbroken(unbroken, workdir=WORKDIR):
    state, left = unbroken
    resumed, run = run_toy(workdir, 12)
    assert run.step == 12
    assert_same_bits(resumed, state)
    ledger, *logs = left_in(workdir)
    assert {row["step"]: row for row in ledger} == {row["step"]: row for row in left[0]}
    assert logs == list(left[1:])
    reports = verify(workdir)
    # A kill after the last save and before the end leaves a step that no later save deletes.
    assert [report.step for report in reports][-3:] == [8, 10, 12]
    assert all(report.problems == () for report in reports)


def names(store):
    return {name.removeprefix("/bucket/run/") for name in store}


def test_an_unbroken_run_leaves_what_a_local_one_does(store, unbroken):
    assert_goes_on_as_unbroken(unbroken)
    assert "run.lock" not in names(store)
    assert load_params(WORKDIR).step == 12
    # Started again, it finds that all is done.
    assert_goes_on_as_unbroken(unbroken)


def test_killed_between_any_two_puts_it_goes_on_bitwise(store, unbroken, monkeypatch):
    """A kill is what the store held at that moment, a lock that nobody renews included."""
    monkeypatch.setattr(appended, "_PUT_SECONDS", 0.0)  # logs run ahead of the checkpoints
    moments = []

    def remember(change, name):
        if "run.lock" not in name:
            moments.append((f"{change} {name}", dict(store)))

    FlatStore.before_change = remember
    run_toy(WORKDIR, 12)
    FlatStore.before_change = None
    assert len(moments) > 100
    of_interest = ("MANIFEST", "deleted-", "remove /bucket/run/checkpoints/4", "jsonl.parts")
    chosen = {
        [i for i, (change, _) in enumerate(moments) if word in change][order]: word
        for word in of_interest
        for order in (1, -1)
    }
    for index in chosen:
        change, objects = moments[index]
        print("killed before", change)
        store.clear()
        store.update(objects)
        assert_goes_on_as_unbroken(unbroken)
        left = {name.split("/")[1] for name in names(store) if name.startswith("checkpoints/")}
        assert left == set(map(str, list_steps(WORKDIR)))  # nothing unfinished, no mark


def test_an_upload_that_fails_is_told_and_what_it_left_is_removed(store, unbroken):
    def refuse(change, name):
        if name.endswith("/6/_METADATA"):
            raise OSError("connection reset")

    FlatStore.before_change = refuse
    with pytest.raises(CheckpointError, match="step 6 .*connection reset.*last good step is 4"):
        run_toy(WORKDIR, 12)
    assert list_steps(WORKDIR) == [2, 4]
    assert not any(name.startswith("checkpoints/6") for name in names(store))
    FlatStore.before_change = None
    assert_goes_on_as_unbroken(unbroken)


@pytest.mark.parametrize("damage", ["bit", "missing", "manifest"])
def test_a_damaged_object_is_found_and_an_older_step_used(store, unbroken, caplog, damage):
    run_toy(WORKDIR, 12, stop_after=6)
    data = max(
        (name for name in store if "/checkpoints/6/" in name), key=lambda name: store[name].size
    )
    if damage == "bit":
        content = bytearray(store[data].getvalue())
        content[len(content) // 2] ^= 1
        store[data] = MemoryFile(None, data, bytes(content))
    else:
        del store[data if damage == "missing" else "/bucket/run/checkpoints/6/MANIFEST.json"]
    assert verify(WORKDIR)[-1].problems
    assert load_params(WORKDIR).step == 4
    run_toy(WORKDIR, 12, stop_after=5)
    assert "6 is corrupt" in caplog.text and "corrupt-6" in caplog.text
    assert list_steps(WORKDIR) == [2, 4] and "checkpoints/corrupt-6" in names(store)
    assert_goes_on_as_unbroken(unbroken)  # step 6, saved again, counts again
    assert "checkpoints/corrupt-6" not in names(store)


def test_a_second_run_is_refused_and_a_dead_one_blocks_nobody(store, caplog):
    first = Lock(WORKDIR)
    first.acquire()
    with pytest.raises(WorkdirInUseError, match="flat://bucket/run is in use by process"):
        run_toy(WORKDIR, 2)
    assert names(store) == {"run.lock"}
    left = store["/bucket/run/run.lock"]
    first.release()
    first.release()
    assert not store
    store["/bucket/run/run.lock"] = left  # as a killed process would have left it
    started = time.monotonic()
    second = Lock(WORKDIR)
    second.acquire()  # not at once: it could live
    assert 0.2 < time.monotonic() - started < 5.0
    assert "waiting to see whether it lives" in caplog.text
    second.release()
    # One without a sensible clock is watched for as long.
    about = json.loads(left.getvalue()) | {"renewed": time.time() + 1e6}
    store["/bucket/run/run.lock"] = MemoryFile(None, "", json.dumps(about).encode())
    Lock(WORKDIR).acquire()


def test_of_two_that_take_over_a_dead_lock_one_gets_it(store):
    store["/bucket/run/run.lock"] = MemoryFile(None, "", b'{"renewed": 0}')
    locks, refused = [Lock(WORKDIR) for _ in range(4)], []

    def take(lock):
        try:
            lock.acquire()
        except WorkdirInUseError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    for lock in locks:
        lock.release()
    assert not store


def test_a_lost_lock_ends_the_run_at_its_next_save(store):
    config = RunConfig(log_every_steps=1, save_every_steps=2)
    run = Run(WORKDIR, {"seed": 0}, config, total_steps=12, tokens_per_step=32)
    theirs = None
    with pytest.raises(WorkdirInUseError, match="lost its lock: process 7 on host other"), run:
        state, batches = run.restore(toy_state(), ToyBatches())
        while run.step < 12:
            state, metrics = toy_step(state, next(batches))
            state = run.after_step(state, metrics)
            if run.step == 3:
                run._saver.checkpointer.wait()
                about = {"pid": 7, "host": "other", "since": "noon", "renewed": time.time()}
                lock = json.dumps(about).encode()
                store["/bucket/run/run.lock"] = MemoryFile(None, "", lock)
                theirs = dict(store)
                time.sleep(0.3)
    assert run.step == 4
    changed = {name for name in store if store[name] is not theirs.get(name)}
    # Only what no other start writes: this one's events and account of its time.
    assert all("/tensorboard/" in name or "/goodput/" in name for name in changed), changed


def test_a_lock_that_cannot_be_renewed_is_given_up_in_time(store):
    lock = Lock(WORKDIR)
    lock.acquire()

    def refuse(change, name):
        raise OSError("no network")

    FlatStore.before_change = refuse
    time.sleep(0.2)
    lock.check()
    time.sleep(0.5)
    with pytest.raises(WorkdirInUseError, match="could not be renewed"):
        lock.check()
    FlatStore.before_change = None
    lock.release()


def test_a_log_grows_in_parts_and_waits_for_a_store_that_is_away(store, monkeypatch):
    monkeypatch.setattr(appended, "_PART_BYTES", 100)
    writer = MetricsWriter(WORKDIR, patient=True)
    writer.open(0, None)
    for step in range(1, 10):
        writer.write(step, {"train/loss": step})
    assert not any("metrics" in name for name in names(store))  # nothing is put until a save
    sizes = writer.sync()
    for step in range(10, 13):
        writer.write(step, {"train/loss": step})

    def refuse(change, name):
        raise OSError("no network")

    FlatStore.before_change = refuse
    monkeypatch.setattr(appended, "_PUT_SECONDS", 0.0)
    writer.write(13, {"train/loss": 13})  # a warning, as the writer is patient
    FlatStore.before_change = None
    writer.close()
    assert [row["step"] for row in logged(WORKDIR)] == list(range(1, 14))
    parts = [name for name in sorted(store) if "metrics.jsonl.parts" in name]
    assert len(parts) == 2 and parts[1].endswith(f"{sizes['metrics.jsonl']:012d}")
    writer = MetricsWriter(WORKDIR)
    writer.open(9, sizes)
    writer.write(10, {"train/loss": -1})
    writer.close()
    assert [row["train/loss"] for row in logged(WORKDIR)] == [*range(1, 10), -1]


def test_tensorboard_hides_what_a_resume_does_again(store):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for step in (0, 4):
        writer = MetricsWriter(WORKDIR)
        writer.open(step, None)
        writer.write(step + 1, {"train/loss": 1.0})
        writer.close()
    files = sorted(name for name in store if "/tensorboard/" in name)
    assert len(files) == 2
    events, content = [], store[files[1]].getvalue()
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert [e.session_log.status for e in events if e.HasField("session_log")] == [SessionLog.START]
    assert [e.step for e in events[1:]] == [5, 5]


def test_a_workdir_copied_between_store_and_file_system_goes_on(store, unbroken, tmp_path):
    run_toy(WORKDIR, 12, stop_after=7)
    epath.Path(WORKDIR).download(epath.Path(tmp_path))
    assert_goes_on_as_unbroken(unbroken, tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "metrics.jsonl.parts").exists()
    store.clear()
    local = tmp_path / "local"
    run_toy(local, 12, stop_after=7)
    files = [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()]
    (local / "run.lock").write_text('{"renewed": 0}')
    epath.Path(WORKDIR).upload(epath.Path(local), files)
    assert_goes_on_as_unbroken(unbroken)


def test_a_line_added_by_another_process_in_between_stays(store):
    path = absolute(WORKDIR) / "ledger.jsonl"

    def another(change, name):
        FlatStore.before_change = None
        append_json_line(path, {"row": "theirs"})

    append_json_line(path, {"row": 0})
    FlatStore.before_change = another
    append_json_line(path, {"row": "ours"})
    assert [row["row"] for row in read_json_lines(path)] == [0, "theirs", "ours"]


def test_a_profile_is_put_on_the_store(store):
    config = RunConfig(profile_start_step=2, profile_num_steps=1)
    run = Run(WORKDIR, {}, config, total_steps=4, tokens_per_step=1)
    with run:
        state, batches = run.restore(toy_state(), ToyBatches())
        while run.step < 4:
            state, metrics = toy_step(state, next(batches))
            state = run.after_step(state, metrics)
    assert any(name.startswith("profile/") and name.endswith(".pb") for name in names(store))


def test_mistakes_are_one_line(store, monkeypatch):
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[(gcs)\]'"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        run_toy("gs://bucket/run", 2)
    with pytest.raises(StoreError, match="no kind of object store called 'gcp://'"):
        run_toy("gcp://bucket/run", 2)
