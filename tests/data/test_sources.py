"""Sources: what becomes a document, what a bad row, what an error at once; hold-out and shards."""

import bz2
import gzip
import json
import lzma
import pickle
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard

from llm.data import source_files
from llm.data.config import SourceConfig
from llm.data.sources import BadRow, Document, SourceError, open_source

ROWS = [{"text": f"row {i}", "film": f"film {i // 3}"} for i in range(60)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_all(config, split="train", **options):
    source = open_source(config, split, **options)
    return [item for shard in source.shards() for item in source.read(shard)]


def whole(*paths, **options):
    return SourceConfig(paths=tuple(map(str, paths)), validation_fraction=0.0, **options)


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


# --- Formats --------------------------------------------------------------------------------


def test_jsonl_document_names_file_and_row(tmp_path):
    path = write_jsonl(tmp_path / "notes.jsonl", [{"text": "eins"}, {"text": "zwei"}])
    first, second = read_all(whole(path))
    assert (first.text, first.id) == ("eins", f"{path}:1")
    assert (second.text, second.id) == ("zwei", f"{path}:2")


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_read_like_plain_ones(tmp_path, ending):
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    # Two members one after the other, as parallel packers write them.
    packed = PACKERS[ending](content) + PACKERS[ending](b'{"text": "last"}\n')
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed)
    expected = [row["text"] for row in ROWS] + ["last"]
    assert texts(read_all(whole(tmp_path / "*.jsonl*"))) == expected


@pytest.mark.parametrize("ending", PACKERS)
def test_a_cut_off_compressed_file_is_an_error_not_an_end(tmp_path, ending):
    content = "".join(json.dumps({"text": f"{i} {hash(i * 7919)}"}) + "\n" for i in range(20_000))
    packed = PACKERS[ending](content.encode())
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(SourceError, match=r"a\.jsonl\.\w+ cannot be read at row \d+"):
        read_all(whole(tmp_path / f"a.jsonl{ending}"))


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfline\r\n\nline\n")
    (tmp_path / "a.txt").write_text("first")
    items = read_all(whole(tmp_path / "*.txt"))
    assert texts(items) == ["first", "line\r\n\nline\n"]
    assert [item.group for item in items] == ["a.txt", "b.txt"]


def test_parquet_reads_row_groups_as_shards(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    monkeypatch.setattr(source_files, "PART_BYTES", 1)
    config = whole(path, group_field="film")
    assert len(open_source(config).shards()) == 9  # 60 rows in groups of 7
    items = read_all(config)
    assert texts(items) == [row["text"] for row in ROWS]
    assert items[59].id == f"{path}:60" and items[59].group == "film 19"


def test_parquet_strings_with_broken_utf8_are_bad_rows(tmp_path):
    column = pa.array([b"fine", b"\xff\xfe", None]).cast(pa.string(), safe=False)
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    good, bad, none = read_all(whole(tmp_path / "a.parquet"))
    assert good.text == "fine"
    assert (bad.row, bad.reason) == (2, "invalid UTF-8 in 'text', byte 0")
    assert (none.row, none.reason) == (3, "no field 'text'")


@pytest.mark.parametrize("last_newline", [True, False])
@pytest.mark.parametrize("part_bytes", [1, 2, 17, 20, 33, 1000])
def test_parts_of_a_large_file_hold_each_line_once(tmp_path, monkeypatch, part_bytes, last_newline):
    lines = [json.dumps({"text": "x" * (i % 11)}) for i in range(1, 40)]
    content = "\n".join(lines) + "\n" * last_newline
    (tmp_path / "a.jsonl").write_text(content)
    expected = read_all(whole(tmp_path / "a.jsonl"))
    monkeypatch.setattr(source_files, "PART_BYTES", part_bytes)
    config = whole(tmp_path / "a.jsonl")
    assert len(open_source(config).shards()) == -(-len(content) // part_bytes)
    assert read_all(config) == expected  # ids (row numbers) included
    assert len(expected) == 39


# --- Bad rows -------------------------------------------------------------------------------


def test_bad_rows_are_told_with_file_and_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n'
        b'{"text": "latin-1 \xe9"}\n'
        b"\n"  # a blank line is no row, but counts in the numbers
        b'{"text": 5}\n'
        b'{"body": "wrong field"}\n'
        b'{"text": "broken\n'
        b'{"text": " \\n "}\n'
        b'{"text": "\\ud800"}\n'
        b'["text"]\n'
        b'{"text": "' + b"x" * 101 + b'"}\n'
        b'{"text": "end"}'
    )
    items = read_all(whole(path, max_document_bytes=100))
    assert texts(items) == ["good", "end"]
    bad = [item for item in items if isinstance(item, BadRow)]
    assert {item.source for item in bad} == {str(path)}
    assert [item.row for item in bad] == [2, 4, 5, 6, 7, 8, 9, 10]
    expected = ["invalid UTF-8 at byte 18", "is int, not text", "no field 'text'", "broken JSON"]
    expected += ["empty text", "surrogate", "JSON list", "101 bytes, more than max_document_bytes"]
    for item, reason in zip(bad, expected, strict=True):
        assert reason in item.reason


def test_an_endless_line_is_skipped_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl"
    line = b'{"text": "' + b"x" * (3 * 2**20) + b'"}\n'
    path.write_bytes(b'{"text": "a"}\n' + line + b'{"text": "b"}\n')
    first, bad, last = read_all(whole(path, max_document_bytes=10))
    assert (first.text, last.text, bad.row) == ("a", "b", 2)
    assert f"line of {len(line)} bytes" in bad.reason


def test_text_files_can_be_bad_rows(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_bytes(b"x" * 11)
    (tmp_path / "none.txt").write_bytes(b"\n")
    reasons = [row.reason for row in read_all(whole(tmp_path / "*.txt", max_document_bytes=10))]
    assert reasons == [
        "invalid UTF-8 in 'text', byte 3",
        "more than max_document_bytes=10 bytes",
        "empty text",
    ]


# --- Hold-out -------------------------------------------------------------------------------


def test_hold_out_is_by_group_and_stable(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    config = SourceConfig(paths=(path,), group_field="film", validation_fraction=0.3)
    train, held_out = read_all(config), read_all(config, "validation")
    assert sorted(texts(train) + texts(held_out)) == sorted(row["text"] for row in ROWS)
    groups = {item.group for item in held_out}
    assert groups and not groups & {item.group for item in train}
    # More rows before the old ones move none of those to the other side.
    write_jsonl(tmp_path / "a.jsonl", [{"text": "new", "film": "new"}, *ROWS])
    assert {item.group for item in read_all(config, "validation")} - {"new"} == groups


def test_hold_out_share_is_about_the_fraction(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(5000)])
    config = SourceConfig(paths=(path,), validation_fraction=0.1)
    assert 430 <= len(read_all(config, "validation")) <= 570  # 500 ± 3 standard deviations


def test_without_a_group_field_equal_texts_stay_together(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i % 50}"} for i in range(200)])
    config = SourceConfig(paths=(path,), validation_fraction=0.5)
    assert not set(texts(read_all(config))) & set(texts(read_all(config, "validation")))


def test_named_validation_paths_hold_out_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "held out"}])
    config = SourceConfig(paths=(path,), validation_paths=(other,), validation_fraction=0.5)
    assert len(read_all(config)) == 60
    assert texts(read_all(config, "validation")) == ["held out"]


# --- Errors at open -------------------------------------------------------------------------


def fails(config, split="train", **options):
    begin = time.monotonic()
    with pytest.raises(SourceError) as caught:
        open_source(config, split, **options)
    assert time.monotonic() - begin < 2.0
    return str(caught.value)


def test_missing_files_and_globs(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    assert "no file matches" in fails(whole(tmp_path / "*.parquet"))
    message = fails(whole(tmp_path / "trian.jsonl"))
    assert "no file" in message and "did you mean train.jsonl" in message
    assert "there is no folder" in fails(whole(tmp_path / "absent" / "a.jsonl"))
    assert "is a folder" in fails(whole(tmp_path))
    assert "needs paths" in fails(SourceConfig())


def test_missing_field_names_those_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "x", "id": 1}])
    assert "no field 'text'; it has content, id" in fails(whole(path))
    assert "no field 'film'" in fails(whole(path, text_field="content", group_field="film"))
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"content": ["x"]}), table)
    assert "no field 'text'; it has content" in fails(whole(table))


def test_wrong_formats(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x"}]\n')
    assert "one JSON array" in fails(whole(tmp_path / "a.json"))
    (tmp_path / "a.csv").write_text("text\nx\n")
    assert ".csv files are not read" in fails(whole(tmp_path / "a.csv"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    assert "not a whole Parquet file" in fails(whole(tmp_path / "a.parquet"))
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    assert "holds zero bytes" in fails(whole(tmp_path / "a.bin"))
    (tmp_path / "a.txt").write_text("x")
    assert "differ in format" in fails(whole(tmp_path / "a.json", tmp_path / "a.txt"))


def test_nothing_to_validate_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert "nothing to validate on" in fails(whole(path), "validation")
    (tmp_path / "a.txt").write_text("one file cannot be cut")
    one = SourceConfig(paths=(str(tmp_path / "a.txt"),))
    assert "a text file is one document" in fails(one, "validation")


def test_unknown_tfds_names(tmp_path):
    def tfds_source(name, **options):
        return SourceConfig(kind="tfds", name=name, **options)

    cache = {"cache_dir": str(tmp_path)}
    assert "did you mean english_prose" in fails(tfds_source("englsh_prose"), **cache)
    assert "its configs are films, rows" in fails(tfds_source("film_reviews/row"), **cache)
    message = fails(tfds_source("film_reviews", text_field="review"), **cache)
    assert "no field 'review'; it has text, film" in message


def test_hugging_face_library_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = fails(SourceConfig(kind="huggingface", name="owner/name"))
    assert "needs the library `datasets`" in message and "pip install" in message


# --- TFDS -----------------------------------------------------------------------------------


class LittleRows(tfds.core.GeneratorBasedBuilder):
    """A data set of ten rows, one of them broken."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": b"\xff" if i == 5 else f"text {i}", "number": i // 2}


def test_any_tfds_data_set_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = SourceConfig(
        kind="tfds", name="little_rows", validation_split="test", group_field="number"
    )
    items = read_all(config)
    assert texts(items) == [f"text {i}" for i in range(8) if i != 5]
    assert items[5] == BadRow("little_rows[train]", 6, "invalid UTF-8 in 'text', byte 0")
    assert (items[7].id, items[7].group) == ("little_rows[train]:8", "3")
    assert texts(read_all(config, "validation")) == ["text 0", "text 1"]
    half = SourceConfig(kind="tfds", name="little_rows", split="train[:50%]", validation_fraction=0)
    assert len(read_all(half)) == 4
    wrong = SourceConfig(kind="tfds", name="little_rows", split="tran")
    assert "no split 'tran'; it has" in fails(wrong)
    assert "tensorflow" not in sys.modules


def test_sources_travel_to_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = open_source(SourceConfig(kind="tfds", name="little_rows", validation_fraction=0.0))
    shard = source.shards()[0]
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy.read(shard)) == list(source.read(shard))


# --- Fingerprints ---------------------------------------------------------------------------


def test_fingerprint_follows_data_and_fields(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    config = SourceConfig(paths=(path,))
    first = open_source(config).fingerprint()
    assert open_source(config).fingerprint() == first
    assert open_source(config, "validation").fingerprint() != first
    by_film = SourceConfig(paths=(path,), group_field="film")
    assert open_source(by_film).fingerprint() != first
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:])
    assert open_source(config).fingerprint() != first


def test_hugging_face_data_set_from_a_folder(tmp_path):
    pytest.importorskip("datasets")  # optional
    write_jsonl(tmp_path / "train.jsonl")
    config = SourceConfig(
        kind="huggingface", name=str(tmp_path), group_field="film", validation_fraction=0.0
    )
    items = read_all(config)
    assert texts(items) == [row["text"] for row in ROWS]
    assert items[3].group == "film 1"
