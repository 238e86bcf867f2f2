"""Data files of any bytes: rows are skipped, counted and named up to a limit, or one error names
the file. Never what a library raises. HYPOTHESIS_PROFILE=long searches longer (tests/conftest.py).
"""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pathlib
import tempfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.entry import _is_users_mistake
from llm.data.chat import ChatError
from llm.data.config import ComparisonsConfig, DataConfig, SourceConfig
from llm.data.feedback_source import load_feedback
from llm.data.prepare import prepare
from llm.data.rows import BadRow, Document, SourceError
from llm.data.shard_writer import BadRowsError
from llm.data.sources import open_source
from llm.data.tokenizer_training import byte_tokenizer
from llm.rl.prompts import load_prompts

PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
GOOD = [
    {"text": "a row", "messages": [{"role": "user", "content": "q"}], "prompt": "p"},
    {"text": "é", "prompt": "q", "response": "r", "chosen": "x", "rejected": "y", "id": 7},
    {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2.5], "ranking": [0, 1], "label": True},
]
NAMES = sorted(
    {name for row in GOOD for name in row} | {"role", "content", "from", "value", "edit"}
)

# What JSON can say and a row should not: other types, half pairs, numbers of any size, nesting.
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\ud800", "\0", "\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: a", "<|eos|>", " "]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just(10**400),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | TEXTS, each, max_size=4)
    ),
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "gpt"]) | JSON, "content": TEXTS}
    ),
    max_size=3,
)
ROWS = st.dictionaries(st.sampled_from(NAMES), JSON | TEXTS | TURNS, max_size=6)
LINES = st.one_of(
    ROWS.map(json.dumps).map(str.encode),
    JSON.map(json.dumps).map(str.encode),
    st.sampled_from(GOOD)
    .map(json.dumps)
    .flatmap(
        lambda line: st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "cp037"]).map(line.encode)
    ),
    st.binary(max_size=30),
    st.sampled_from(
        [
            b'{"text": "cut',
            b"[" * 2000,
            b'{"messages":' * 900 + b"1" + b"}" * 900,
            b"\xff\xfe",
            b"\r",
        ]
        + [b'{"text": 1' + b"0" * 5000 + b"}", b'{"text": "caf\xe9"}', b"NaN", b'{"text": NaN}']
        + [b'{"chosen":' + b"[" * 990 + b"]" * 990 + b',"rejected":1}', b'{"text": "\\ud800"}']
    ),
)


def check(content: bytes, ending: str, *formats: str) -> None:
    """Read a file as documents, as feedback and as prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"file{ending}"
        path.write_bytes(content)
        check_path(path, *formats)


def check_path(path: pathlib.Path, *formats: str) -> None:
    config = SourceConfig(paths=(str(path),), validation_fraction=0.0)
    asked = dataclasses.replace(config, text_field="prompt", kept_fields=("id",))
    feedback = ComparisonsConfig(source=dataclasses.replace(config, format="feedback"))
    readings = [
        lambda: load_prompts(asked, TOKENIZER, max_tokens=64, max_bad_rows=100).bad_rows,
        lambda: load_feedback(feedback).bad_rows,
    ]
    for changes in ({"format": each} for each in formats):
        readings.append(lambda changes=changes: documents(config, **changes))
        readings.append(lambda changes=changes: documents(config, group_field="prompt", **changes))
    for reading in readings:
        try:
            rows = reading()
        except Exception as error:
            if not _is_users_mistake(error):
                raise
            assert path.name in str(error), error
            assert len(str(error)) < 2000
            continue
        for row in rows:
            if isinstance(row, BadRow):
                assert row.source == str(path) and row.row >= 1
                assert row.reason.isprintable() and len(row.reason) < 1000
            else:
                assert row.text.encode()
                row.group.encode()


def documents(config: SourceConfig, **changes) -> list[Document | BadRow]:
    source = open_source(dataclasses.replace(config, **changes))
    return [row for shard in source.shards() for row in source.read(shard)]


TOKENIZER = byte_tokenizer()
FORMATS = ("text", "messages", "prompt_response")


@example([b'{"messages": {"role": 5, "content": [1, 2]}}'], b"\n", "messages")
@example([b'{"text": "t", "prompt": "\\ud800"}'], b"\n", "text")
@example([b'{"chosen":' + b"[" * 400 + b"]" * 400 + b',"rejected":[]}'], b"\n", "text")
@given(st.lists(LINES, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.sampled_from(FORMATS))
def test_lines_of_any_kind(lines, end, format):
    check(end.join(lines), ".jsonl", format)


@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".txt", ".parquet", ".json"]),
       st.sampled_from(sorted(PACKERS)))  # fmt: skip
def test_bytes_of_any_kind(content, ending, packing):
    check(content, ending + packing, "text")
    check(PACKERS[packing](content), ending + packing, "text")


WHOLE = b"".join(json.dumps(row).encode() + b"\n" for row in GOOD * 5)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a whole file cut off, or with some bytes changed."""
    places = st.lists(
        st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )

    def change(places: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, byte in places:
            changed[place] = byte
        return bytes(changed)

    return places.map(change) | st.integers(0, len(content) - 1).map(lambda n: content[:n])


@pytest.mark.parametrize("packing", sorted(PACKERS))
@given(data=st.data())
def test_damaged_compressed_files(packing, data):
    check(data.draw(damaged(PACKERS[packing](WHOLE))), ".jsonl" + packing, "text")


TABLES = {
    "texts": pa.table({"text": ["a", "b", None], "prompt": ["p", "q", "r"]}),
    "broken UTF-8": pa.table({"text": [b"\xff", b"ok"]}),
    "turns": pa.table({"messages": [[{"role": "user", "content": "q"}], None, []]}),
    "other types": pa.table({"text": [1.5, 2.5], "prompt": [[1], [2]], "messages": [True, None]}),
    "dictionary": pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}),
    "empty": pa.table({"text": pa.array([], pa.string())}),
}


def packed(table: pa.Table) -> bytes:
    with io.BytesIO() as file:
        pyarrow.parquet.write_table(table, file, row_group_size=2)
        return file.getvalue()


@pytest.mark.parametrize("kind", TABLES)
@given(data=st.data())
def test_damaged_parquet_files(kind, data):
    check(data.draw(st.just(packed(TABLES[kind])) | damaged(packed(TABLES[kind]))), ".parquet",
          *FORMATS)  # fmt: skip


# --- Files that are no files, and files larger than they look ---------------------------------


def fails(path, **changes) -> str:
    with pytest.raises(SourceError) as caught:
        documents(SourceConfig(paths=(str(path),), validation_fraction=0.0), **changes)
    return str(caught.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "is a pipe or device" in fails(tmp_path / "pipe.jsonl")
    assert "is a pipe or device" in fails("/dev/zero")
    assert "is a folder" in fails(tmp_path / "folder.jsonl")
    assert "loop.jsonl" in fails(tmp_path / "loop.jsonl")
    assert "no file matches" in fails(tmp_path / "*.jsonl")
    assert "no file" in fails(tmp_path / ("long" * 100 + ".jsonl"))
    (tmp_path / b"\xff.txt".decode("utf-8", "surrogateescape")).write_text("text")
    assert "is not UTF-8; rename it" in fails(tmp_path / "*.txt")


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_file_that_unpacks_to_a_thousand_times_its_size(tmp_path, ending, packing):
    path = tmp_path / f"bomb{ending}{packing}"
    path.write_bytes(PACKERS[packing](b"a" * 2**25 + b"\n" + WHOLE))
    config = SourceConfig(paths=(str(path),), validation_fraction=0.0, max_document_bytes=2**16)
    tracemalloc.start()
    rows = documents(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[0].row == 1 and "limit of" in rows[0].reason or "max_document" in rows[0].reason
    assert len(rows) == (1 if ending == ".txt" else 16)
    assert peak < 2**24


def test_long_texts_that_parquet_stores_once(tmp_path):
    """Read a row at a time they are small; 256 together would be 4 GB."""
    path = tmp_path / "bomb.parquet"
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 2000, ["a" * 2**24])})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 2**20
    before = pa.total_allocated_bytes()
    source = open_source(SourceConfig(paths=(str(path),), validation_fraction=0.0))
    rows = source.read(source.shards()[0])
    assert [len(next(rows).text) for _ in range(3)] == [2**24] * 3
    assert pa.total_allocated_bytes() - before < 2**27


def test_rows_that_a_chat_template_refuses_are_bad_rows(tmp_path):
    """A template is somebody's program: what it raises is told with file and row."""
    template = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    template += "{{ messages[0].content }}{{ 1 // (messages[0].content|length - 3) }}"
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "yes"}]
    asked = [{**turns[0], "content": "what?"}, turns[1]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (asked, turns, asked * 2)))
    source = SourceConfig(paths=(str(path),), validation_fraction=0.0, format="messages")
    tokenizer = TOKENIZER.with_chat_template(template)
    data = DataConfig(sources={"chats": source}, cache_dir=str(tmp_path), max_bad_rows=2)
    prepared = prepare(data, tokenizer, num_workers=0)
    assert prepared.train["chats"].num_documents == 1
    bad = prepared.report["bad_rows"]["chats"]["rows"]
    assert [row[:2] for row in bad] == [[str(path), 2], [str(path), 3]]
    assert "division" in bad[0][2] and "too many" in bad[1][2]
    with pytest.raises(BadRowsError, match="max_bad_rows=1 bad rows, the first: .*chats.jsonl:2"):
        prepare(dataclasses.replace(data, max_bad_rows=1), tokenizer, num_workers=0)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.nothing.nothing }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{% if %}",
        "{{ (" + "(" * 5000,
    ],
)
def test_templates_that_never_end_or_reach_out(template):
    with pytest.raises(ChatError, match="the chat template cannot render"):
        TOKENIZER.with_chat_template(template).render_chat([{"role": "user", "content": "x"}])
