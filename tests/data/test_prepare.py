"""Preparation: right tokens, the same bytes however it ran, duplicates and bad rows dealt with."""

import dataclasses
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from llm.data import groups as groups_module
from llm.data import workers as workers_module
from llm.data.config import DataConfig, SourceConfig
from llm.data.groups import group_parts, make_groups
from llm.data.loader import make_evaluation_batches
from llm.data.prepare import OverlapError, prepare
from llm.data.shard_writer import BadRowsError
from llm.data.sources import Shard
from llm.data.tokenizer_training import byte_tokenizer


def story(seed, num_words=60):
    rng = random.Random(seed)
    return " ".join(
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(num_words)
    )


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make_config(tmp_path, train, held_out=("held out words",), **fields):
    """One source a name in `train`, a dict name → texts, all with the same held-out file."""
    held_out_path = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    sources = {}
    for i, (name, texts) in enumerate(train.items()):
        path = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        validation = (
            {"validation_paths": (held_out_path,)} if i == 0 else {"validation_fraction": 0}
        )
        sources[name] = SourceConfig(paths=(path,), **validation)
    return DataConfig(sources=sources, **fields)


def texts_of(split):
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(split.tokens(i)[1:-1]) for i in range(split.num_documents)]


def digests(folder):
    """Every file below a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_documents_become_tokens_between_bos_and_eos(tmp_path):
    texts = ["First.", "Zweites Stück", "第三 🙂"]
    tokenizer = byte_tokenizer()
    prepared = prepare(make_config(tmp_path, {"a": texts}), tokenizer, tmp_path / "out")
    split = prepared.train["a"]
    assert split.num_documents == 3
    for i, text in enumerate(texts):
        # Bytes are their own ids in this tokenizer.
        expected = [tokenizer.bos_id, *text.encode(), tokenizer.eos_id]
        assert split.tokens(i).tolist() == expected
    assert split.num_bytes.tolist() == [6, 14, 11]
    assert texts_of(prepared.validation["a"]) == ["held out words"]
    assert prepared.report["train"]["a"]["bytes"] == 31
    assert split.manifest["documents"] == 3 and split.manifest["tokenizer"] == tokenizer.digest


def many_files(tmp_path, count=6):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(count):
        write_jsonl(folder / f"{i}.jsonl", [story(100 * i + j) for j in range(20)])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [story(9000 + j) for j in range(5)])
    source = SourceConfig(paths=(str(folder / "*.jsonl"),), validation_paths=(held_out,))
    return DataConfig(sources={"many": source})


def test_any_number_of_workers_leaves_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(groups_module, "_SHARD_BYTES", 1)  # a shard a file
    config = many_files(tmp_path)
    found = []
    for workers in (0, 1, 3):
        prepared = prepare(config, byte_tokenizer(), tmp_path / str(workers), workers)
        found.append(digests(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]
    assert len(prepared.train["many"].manifest["shards"]) == 6
    assert prepared.train["many"].num_documents == 120


_CHILD = """
    import dataclasses, sys, time
    from llm.data import groups, prepare, workers
    from llm.data.config import DataConfig, SourceConfig
    from llm.data.tokenizer_training import byte_tokenizer

    groups._SHARD_BYTES = 1
    write = workers.write_tokenized_shard
    def slowly(task, tokenizer):
        time.sleep(0.3)
        return write(task, tokenizer)
    workers.write_tokenized_shard = slowly
    paths, held_out, out = sys.argv[1:]
    source = SourceConfig(paths=(paths,), validation_paths=(held_out,))
    prepare.prepare(DataConfig(sources={"many": source}), byte_tokenizer(), out, 0)
"""


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(groups_module, "_SHARD_BYTES", 1)
    config = many_files(tmp_path)
    (source,) = config.sources.values()
    arguments = [source.paths[0], source.validation_paths[0], str(tmp_path / "killed")]
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_CHILD), *arguments])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*/many/train/shard-*.json"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = list((tmp_path / "killed").glob("*/many/train/shard-*.json"))
    assert 2 <= len(done) < 6
    assert not list((tmp_path / "killed").glob("*/report.json"))
    written = {path: path.stat().st_mtime_ns for path in done}
    # Half a shard, as a kill in the middle of a write leaves it: of the child, and of one alive.
    half = f"shard-00005.array_record.{platform.node()}"
    (done[0].parent / f"{half}.{child.pid}.tmp").write_bytes(b"half")
    alive = done[0].parent / f"{half}.{os.getppid()}.tmp"
    alive.write_bytes(b"half")

    prepare(config, byte_tokenizer(), tmp_path / "killed", 2)
    assert {path: path.stat().st_mtime_ns for path in done} == written
    prepare(config, byte_tokenizer(), tmp_path / "unbroken", 0)
    alive.unlink()
    assert digests(tmp_path / "killed") == digests(tmp_path / "unbroken")


def test_a_damaged_shard_of_an_unfinished_preparation_is_written_again(tmp_path):
    config = many_files(tmp_path)
    good = prepare(config, byte_tokenizer(), tmp_path / "out")
    expected = digests(tmp_path / "out")
    shard = good.path / "many" / "train" / "shard-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-10])
    (good.path / "report.json").unlink()
    prepare(config, byte_tokenizer(), tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_the_second_call_only_opens_what_is_there(tmp_path, monkeypatch):
    config = many_files(tmp_path)
    first = prepare(config, byte_tokenizer(), tmp_path / "out")
    monkeypatch.setattr(workers_module, "write_tokenized_shard", None)
    again = prepare(config, byte_tokenizer(), tmp_path / "out")
    assert again.train["many"].digest == first.train["many"].digest
    # What does not change a token does not prepare anew.
    source = dataclasses.replace(config.sources["many"], weight=2.0)
    other = dataclasses.replace(
        config, sources={"many": source}, length_tokens=7, batch_sequences=3, seed=5, max_bad_rows=1
    )
    assert prepare(other, byte_tokenizer(), tmp_path / "out").path == first.path


def test_other_text_or_another_tokenizer_has_a_directory_of_its_own(tmp_path):
    config = make_config(tmp_path, {"a": ["one", "two"]})
    first = prepare(config, byte_tokenizer(), tmp_path / "out")
    tokenizer = byte_tokenizer()
    settings = json.loads(tokenizer.settings) | {"eos_token": "<|pad|>"}
    other_tokenizer = dataclasses.replace(tokenizer, settings=json.dumps(settings))
    second = prepare(config, other_tokenizer, tmp_path / "out")
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    third = prepare(config, byte_tokenizer(), tmp_path / "out")
    assert len({first.path, second.path, third.path}) == 3
    assert texts_of(first.train["a"]) == ["one", "two"]
    assert texts_of(third.train["a"]) == ["one", "two", "three"]


def test_exact_duplicates_are_dropped_over_all_sources(tmp_path):
    train = {
        "a": ["alpha", "beta", "alpha", "held two", "gamma"],
        "b": ["delta", "beta", "held one", "delta", "epsilon"],
    }
    held_out = ["held one", "held two", "held one"]
    config = make_config(tmp_path, train, held_out)
    prepared = prepare(config, byte_tokenizer(), tmp_path / "out")
    assert texts_of(prepared.validation["a"]) == ["held one", "held two"]
    assert texts_of(prepared.train["a"]) == ["alpha", "beta", "gamma"]
    assert texts_of(prepared.train["b"]) == ["delta", "epsilon"]
    report = prepared.report
    assert report["validation"]["a"]["dropped_repeated"] == 1
    for name, repeated in {"a": 1, "b": 2}.items():
        assert report["train"][name]["dropped_repeated"] == repeated
        assert report["train"][name]["dropped_equal_to_held_out"] == 1
    # What was dropped leaks nothing: no near duplicate is left.
    assert report["validation"]["a"]["near_duplicates"] == 0


def test_near_duplicates_of_held_out_text_stop_the_preparation(tmp_path, monkeypatch):
    held_out = [story(i) for i in range(20)]
    leaked = "An edition of: " + held_out[3].upper() + " " + story(500)
    config = make_config(tmp_path, {"a": [story(100), leaked], "b": [story(101)]}, held_out)
    with pytest.raises(OverlapError, match="1 of 20 held-out documents of source 'a'") as error:
        prepare(config, byte_tokenizer(), tmp_path / "out")
    assert "held_out.jsonl:4 in " in str(error.value) and "a.jsonl:2" in str(error.value)
    assert "max_overlap_fraction=0.01" in str(error.value)

    # A raised limit goes on with what is there; the default still stops.
    monkeypatch.setattr(workers_module, "write_tokenized_shard", None)
    allowed = dataclasses.replace(config, max_overlap_fraction=0.05)
    report = prepare(allowed, byte_tokenizer(), tmp_path / "out").report["validation"]["a"]
    assert report["near_duplicates"] == 1 and report["checked"] == 20
    (example,) = report["near_duplicate_examples"]
    assert example["share"] == 1.0
    with pytest.raises(OverlapError):
        prepare(config, byte_tokenizer(), tmp_path / "out")


def broken_file(tmp_path, num_bad):
    path = tmp_path / "broken.jsonl"
    lines = [json.dumps({"text": story(i)}).encode() for i in range(40)]
    for i in range(num_bad):
        lines[3 * i] = [b'{"text": "\xff\xfe"}', b"{", b'{"text": 5}', b'{"text": " "}'][i % 4]
    path.write_bytes(b"\n".join(lines))
    return SourceConfig(paths=(str(path),), validation_fraction=0.2)


def test_bad_rows_are_skipped_counted_and_named(tmp_path):
    config = DataConfig(sources={"a": broken_file(tmp_path, 4)}, max_bad_rows=4)
    prepared = prepare(config, byte_tokenizer(), tmp_path / "out")
    kept = prepared.train["a"].num_documents + prepared.validation["a"].num_documents
    assert kept == 36 and prepared.validation["a"].num_documents > 0
    # Train and held-out rows come from one file: each bad row counts once.
    bad_rows = prepared.report["bad_rows"]["a"]
    assert bad_rows["count"] == 4
    assert [row[1] for row in bad_rows["rows"]] == [1, 4, 7, 10]
    assert all(row[0].endswith("broken.jsonl") for row in bad_rows["rows"])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_stop_with_a_clear_message(tmp_path, workers):
    config = DataConfig(sources={"a": broken_file(tmp_path, 8)}, max_bad_rows=3)
    with pytest.raises(BadRowsError, match="source 'a' has more than data.max_bad_rows=3") as error:
        prepare(config, byte_tokenizer(), tmp_path / "out", workers)
    assert "broken.jsonl:1 invalid UTF-8" in str(error.value)
    assert not list(tmp_path.glob("out/*/report.json"))
    raised = dataclasses.replace(config, max_bad_rows=8)
    prepared = prepare(raised, byte_tokenizer(), tmp_path / "out", workers)
    assert prepared.report["bad_rows"]["a"]["count"] == 8
    with pytest.raises(BadRowsError):  # the limit holds for finished data too
        prepare(config, byte_tokenizer(), tmp_path / "out", workers)


def test_nothing_to_hold_out_or_to_train_on_is_named(tmp_path):
    path = write_jsonl(tmp_path / "few.jsonl", ["one", "two"])
    source = SourceConfig(paths=(path,), validation_fraction=0.001)
    with pytest.raises(ValueError, match="'few' has no held-out text .* raise data.sources.few"):
        prepare(DataConfig(sources={"few": source}), byte_tokenizer(), tmp_path / "out")
    without = dataclasses.replace(source, validation_fraction=0.0)
    prepared = prepare(DataConfig(sources={"few": without}), byte_tokenizer(), tmp_path / "out")
    assert prepared.validation == {} and prepared.train["few"].num_documents == 2
    same = make_config(tmp_path, {"a": ["same"]}, ["same"])
    with pytest.raises(ValueError, match="'a' has no training text \\(1 duplicates dropped"):
        prepare(same, byte_tokenizer(), tmp_path / "out")
    with pytest.raises(ValueError, match="data.sources is empty"):
        prepare(DataConfig(), byte_tokenizer(), tmp_path / "out")


def test_online_packing_prepares_held_out_text_only(tmp_path):
    config = make_config(tmp_path, {"a": ["one", "two"]}, packing="online")
    prepared = prepare(config, byte_tokenizer(), tmp_path / "out")
    assert prepared.train == {} and texts_of(prepared.validation["a"]) == ["held out words"]


def test_prepared_text_fills_rows_and_is_read_in_full(tmp_path):
    config = many_files(tmp_path)
    prepared = prepare(config, byte_tokenizer(), tmp_path / "out")
    split = prepared.validation["many"]
    batches = make_evaluation_batches(split, 256, 4)
    assert batches.rows.of_source["held-out"].fill_rate > 0.8
    pairs = sum(batch["loss_weights"].sum() for batch in batches)
    # Every byte of the text is predicted once, and the end of each document.
    assert pairs == split.num_bytes.sum() + split.num_documents


def test_parts_are_put_together_to_shards_of_a_useful_size(tmp_path, monkeypatch):
    monkeypatch.setattr(groups_module, "_SHARD_BYTES", 100)
    files = [Shard(write_jsonl(tmp_path / f"{i}.jsonl", ["x" * 20])) for i in range(9)]
    assert os.path.getsize(files[0].name) == 33
    assert [len(group) for group in group_parts(files[:6])] == [3, 3]
    ranges = [Shard("corpus[train]", i, i + 10, i + 1) for i in range(0, 30, 10)]
    assert [len(group) for group in group_parts(ranges)] == [1, 1, 1]
    assert group_parts([]) == [()]


def test_many_shards_are_dealt_to_groups_in_turn(monkeypatch):
    parts = [Shard("corpus[train]", i, i + 1, i + 1) for i in range(10)]
    (one,) = make_groups("train", "a", parts, epath.Path("out"))
    assert one.directory == epath.Path("out") and [*one.shards] == [(part,) for part in parts]
    monkeypatch.setattr(groups_module, "_MAX_SHARDS", 4)
    groups = make_groups("train", "a", parts, epath.Path("out"))
    starts = [[part.start for (part,) in group.shards] for group in groups]
    assert starts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert [group.directory.name for group in groups] == [f"group-0000{i}" for i in range(3)]
