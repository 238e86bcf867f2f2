"""The Beam pipeline leaves, file by file, the bytes that `prepare` leaves; and it fails clearly."""

import pickle
import signal
import subprocess
import sys
import textwrap
import time

import fsspec
import pytest
from etils import epath

import llm.training.store_paths  # noqa: F401  epath learns of memory://
from experiments.prepare_data import choose_preparation, describe
from llm.data import groups, prepare_beam
from llm.data.prepare import make_job, prepare
from llm.data.prepare_beam import BeamJobError, NotSharedError, prepare_with_beam
from llm.data.prepared import PreparedDataError
from llm.data.shard_writer import BadRowsError
from llm.data.tokenizer_training import byte_tokenizer
from tests.data.mixed_corpus import digests, mixed_config

# Workers that talk to the runner over the network, as on a cluster; threads of this process.
WORKERS = ("--direct_num_workers=3", "--direct_running_mode=multi_threading")
PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture
def small(monkeypatch):
    """A shard for each file, and groups of two: five files then make three groups."""
    monkeypatch.setattr(groups, "_SHARD_BYTES", 1)
    monkeypatch.setattr(groups, "_MAX_SHARDS", 2)


def of_one_machine(config, directory):
    prepared = prepare(config, byte_tokenizer(), directory)
    describe(config, prepared)  # makes the pack plans, as Beam does
    return prepared, digests(directory)


def of_beam(config, directory, *options):
    prepare_with_beam(config, byte_tokenizer(), directory, options)
    return digests(directory)


@pytest.mark.parametrize("options", [(), WORKERS], ids=["one worker", "three"])
def test_beam_leaves_the_same_bytes(tmp_path, small, options):
    config = mixed_config(tmp_path / "corpus")
    prepared, expected = of_one_machine(config, tmp_path / "local")
    found = of_beam(config, tmp_path / "beam", *options)
    assert found == expected
    # And the corpus was one in which there is something to get wrong.
    train, held_out = prepared.report["train"], prepared.report["validation"]
    for name in ("books", "web"):
        assert train[name]["dropped_repeated"] and train[name]["dropped_equal_to_held_out"]
        assert prepared.report["bad_rows"][name]["count"] == 2
        assert sum(f"/{name}/train/group-" in file for file in expected) > 3 * 5
    assert held_out["books"]["near_duplicates"] == 2
    assert train["chat"]["dropped_repeated"] and prepared.report["bad_rows"]["chat"]["count"] == 1
    assert any("/plans/sizes-" in file for file in expected)


def test_the_cut_of_digests_changes_nothing(tmp_path, small, monkeypatch):
    config = mixed_config(tmp_path / "corpus")
    whole = of_beam(config, tmp_path / "fine")
    monkeypatch.setattr(prepare_beam, "DIGEST_BITS", 1)
    assert of_beam(config, tmp_path / "coarse") == whole


@pytest.mark.long
def test_worker_processes_leave_the_same_bytes(tmp_path):
    config = mixed_config(tmp_path / "corpus")
    _, expected = of_one_machine(config, tmp_path / "local")
    assert of_beam(config, tmp_path / "beam", *PROCESSES) == expected


def test_an_object_store_holds_the_same_bytes(tmp_path, small):
    config = mixed_config(tmp_path / "corpus")
    _, expected = of_one_machine(config, tmp_path / "local")
    store = epath.Path(f"memory://prepared-{tmp_path.name}")
    prepared = prepare_with_beam(config, byte_tokenizer(), store)
    fsspec.filesystem("memory").get(str(store), str(tmp_path / "copy"), recursive=True)
    assert digests(tmp_path / "copy") == expected
    # One machine writes there as well, over what is there: it finds all of it done.
    assert prepare(config, byte_tokenizer(), store).report == prepared.report
    with pytest.raises(PreparedDataError, match="mount the bucket"):
        prepared.train["books"].tokens(0)
    store.rmtree()


@pytest.mark.parametrize("options", [(), WORKERS], ids=["here", "over the network"])
def test_too_many_bad_rows_stop_the_job(tmp_path, small, options):
    config = mixed_config(tmp_path / "corpus", max_bad_rows=1)  # one a file, two a source
    error = BeamJobError if options else BadRowsError
    with pytest.raises(error) as raised:
        prepare_with_beam(config, byte_tokenizer(), tmp_path / "out", options)
    text = str(raised.value)
    assert text.startswith("source 'books' has more than data.max_bad_rows=1 bad rows, the first: ")
    assert "books/1.jsonl:12 field 'text' is int" in text and "\n" not in text
    assert text.endswith("Mend the data, or raise data.max_bad_rows")
    assert not list(tmp_path.glob("out/*/report.json"))


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path, small):
    config = mixed_config(tmp_path / "corpus")
    job = make_job(config, byte_tokenizer(), tmp_path / "out")
    writer = prepare_beam._WriteShard(job)
    with pytest.raises(NotSharedError, match="tokenizer.json.* shared disk or an object store"):
        writer.setup()


_CHILD = """
    import pathlib, pickle, sys, time
    from llm.data import groups, prepare_beam
    from llm.data.tokenizer_training import byte_tokenizer

    groups._SHARD_BYTES, groups._MAX_SHARDS = 1, 2
    write = prepare_beam.write_tokenized_shard
    config, out = sys.argv[1:]
    finished = []
    def write_some(task, tokenizer):
        while len(finished) == 10 and not pathlib.Path(out, "go").exists():
            time.sleep(0.02)
        finished.append(task)
        return write(task, tokenizer)
    prepare_beam.write_tokenized_shard = write_some
    config = pickle.loads(pathlib.Path(config).read_bytes())
    prepare_beam.prepare_with_beam(config, byte_tokenizer(), out)
"""


@pytest.fixture
def started(tmp_path):
    """A job in another process that has ten shards, and does the others when there is a file."""
    config = mixed_config(tmp_path / "corpus")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    arguments = [str(tmp_path / "config.pickle"), str(tmp_path / "out")]
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_CHILD), *arguments])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/**/shard-*.json"))) < 10:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield config, child
    child.kill()


def test_a_killed_job_goes_on_where_it_was(tmp_path, small, started):
    config, child = started
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = list(tmp_path.glob("out/**/shard-*.json"))
    assert not list(tmp_path.glob("out/*/report.json"))
    written = {path: path.stat().st_mtime_ns for path in done}
    found = of_beam(config, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in done} == written
    assert found == of_one_machine(config, tmp_path / "local")[1]


def test_two_jobs_at_once_leave_what_one_does(tmp_path, small, started):
    config, child = started
    of_beam(config, tmp_path / "out")
    (tmp_path / "out" / "go").touch()
    assert child.wait(timeout=60) == 0  # it wrote one over, and all of the rest
    (tmp_path / "out" / "go").unlink()
    assert digests(tmp_path / "out") == of_one_machine(config, tmp_path / "local")[1]
    assert not list(tmp_path.glob("out/**/*.tmp"))


def test_options_without_beam_and_beam_without_its_package_are_named(monkeypatch):
    assert choose_preparation(False, "") is prepare
    with pytest.raises(ValueError, match="--beam_options='--runner=X' are for --beam"):
        choose_preparation(False, "--runner=X")
    assert choose_preparation(True, "--a='b c' -d").keywords == {"options": ["--a=b c", "-d"]}
    monkeypatch.delitem(sys.modules, "llm.data.prepare_beam")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match="needs the package apache-beam .*'.\\[beam\\]'"):
        choose_preparation(True, "")
