"""Sources of kind "files": JSON lines, Parquet and text, compressed or not, local or gs://.
`open_files` finds them; a reader yields raw rows and holds one row in memory at a time."""

import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from etils import epath

from llm.data.compressed import READ_ERRORS, open_unpacked, read_line, split_endings
from llm.data.disk import is_store
from llm.data.rows import BadRow, Row, Shard, SourceError, nearest, unknown_field

_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
_UNREADABLE = (".csv", ".tsv", ".zip", ".tar", ".tgz", ".arrow", ".tfrecord", ".docx", ".pdf")
# A local JSON-lines file is read in parts of this size, so that several processes share it.
PART_BYTES = 64 * 1024 * 1024
_PEEK_ROWS = 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Format = Literal["json", "parquet", "text"]


@dataclasses.dataclass(frozen=True)
class FilesReader:
    """Rows of files of one format."""

    format: Format
    # (path, name): the name is the path below its glob's fixed part, the same on every machine.
    files: tuple[tuple[str, str], ...]
    text_field: str
    max_document_bytes: int

    def check(self, fields: Sequence[str]) -> None:
        """Look into the first file: is it of its format, does it have the fields?"""
        path = self.files[0][0]
        if self.format == "parquet":
            from llm.data.source_parquet import check_parquet

            check_parquet(path, fields)
        elif self.format == "json":
            _check_json(path, fields, self._line_limit)
        else:
            _check_text(path)

    def shards(self) -> list[Shard]:
        """Return whole files, parts of large JSON-lines files, row groups of Parquet files."""
        shards = []
        for path, _ in self.files:
            if self.format == "parquet":
                from llm.data.source_parquet import parquet_shards

                shards += parquet_shards(path, PART_BYTES)
            elif self.format == "json":
                shards += _json_shards(path)
            else:
                shards.append(Shard(path))
        return shards

    def rows(self, shard: Shard, fields: Sequence[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a shard; SourceError if the file breaks off or is damaged."""
        if self.format == "parquet":
            from llm.data.source_parquet import parquet_rows

            return parquet_rows(shard, fields)
        if self.format == "json":
            return _json_rows(shard, self._line_limit)
        return self._text_rows(shard)

    def identity(self) -> str:
        """Return names and sizes: the same for another copy of the files."""
        return repr([(name, epath.Path(path).stat().length) for path, name in self.files])

    def fingerprint(self) -> str:
        """Return names, sizes and times of change."""
        facts = []
        for path, name in self.files:
            stat = epath.Path(path).stat()
            facts.append((name, stat.length, stat.mtime))
        return repr(facts)

    def known_groups(self) -> list[str] | None:
        """Return the names of text files, each of which is a document and its own group."""
        return [name for _, name in self.files] if self.format == "text" else None

    @property
    def _line_limit(self) -> int:
        # A line holds other fields too, and escapes take up to six bytes a character.
        return 8 * self.max_document_bytes + 2**20

    def _text_rows(self, shard: Shard) -> Iterator[Row | BadRow]:
        try:
            with open_unpacked(shard.name) as file:
                content = file.read(self.max_document_bytes + 1)
        except READ_ERRORS as error:
            raise SourceError(f"{shard.name} cannot be read: {error}") from error
        if len(content) > self.max_document_bytes:
            reason = f"more than max_document_bytes={self.max_document_bytes} bytes"
            yield BadRow(shard.name, 1, reason)
            return
        text = content.removeprefix(_BYTE_ORDER_MARK)
        if b"\0" in text:
            yield BadRow(shard.name, 1, "not text: it holds zero bytes")
            return
        yield Row({self.text_field: text}, shard.name, 1, group=dict(self.files)[shard.name])


def open_files(paths: Sequence[str], text_field: str, max_document_bytes: int) -> FilesReader:
    """Return a reader of the files that paths and globs name, sorted, each once.

    Raises:
      SourceError: a path that is not there, a glob that matches nothing, an unknown format.
    """
    if not paths:
        raise SourceError('a source of kind "files" needs paths; it has none')
    files: dict[str, str] = {}
    for pattern in paths:
        try:
            found = _expand(os.path.expanduser(pattern))
        except ImportError as error:  # gs:// and s3:// need a library each
            raise SourceError(f"{pattern} cannot be reached: {error}") from error
        if not found:
            raise SourceError(_nothing_found(pattern))
        files.update(found)
    for path in files:
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise SourceError(f"the name of the file {path!r} is not UTF-8; rename it")
    formats = {_format(path): path for path in files}
    if len(formats) > 1:
        examples = ", ".join(f"{path} ({kind})" for kind, path in formats.items())
        raise SourceError(f"the files of one source differ in format: {examples}; make two sources")
    return FilesReader(
        next(iter(formats)), tuple(sorted(files.items())), text_field, max_document_bytes
    )


def _expand(pattern: str) -> dict[str, str]:
    """Return {path: name below the fixed part} of what a path or glob names."""
    path = epath.Path(pattern)
    if path.exists():
        if path.is_dir():
            raise SourceError(f"{pattern} is a folder; name its files: {path / '*.jsonl'}")
        if not is_store(pattern) and not os.path.isfile(pattern):
            raise SourceError(f"{pattern} is a pipe or device, which cannot be read twice")
        return {pattern: path.name}
    wildcards = [pattern.index(c) for c in "*?[" if c in pattern]
    base = pattern[: min(wildcards, default=len(pattern))].rpartition("/")[0]
    if is_store(pattern):
        found = [str(p) for p in epath.Path(base).glob(pattern[len(base) + 1 :])]
    else:
        found = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    return {p: p[len(base) :].lstrip("/") for p in found}


def _nothing_found(pattern: str) -> str:
    if any(c in pattern for c in "*?["):
        return f"no file matches {pattern!r}"
    folder = epath.Path(pattern).parent
    if not folder.exists():
        return f"no file {pattern}: there is no folder {folder}"
    return f"no file {pattern}" + nearest(
        epath.Path(pattern).name, [p.name for p in folder.iterdir()]
    )


def _format(path: str) -> Format:
    ending, packing = split_endings(path)
    if ending in _UNREADABLE or (ending == ".parquet" and packing):
        raise SourceError(
            f"{path}: {ending}{packing} files are not read; convert to JSON lines, Parquet or text"
        )
    if ending == ".parquet":
        return "parquet"
    return "json" if ending in _JSON_ENDINGS else "text"


def _check_text(path: str) -> None:
    try:
        with open_unpacked(path) as file:
            start = file.read(4096)
    except READ_ERRORS as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if b"\0" in start:
        raise SourceError(f"{path} is not text: it holds zero bytes")


# --- JSON lines -----------------------------------------------------------------------------

_IS_ARRAY = "a JSON list, not an object"


def _check_json(path: str, fields: Sequence[str], limit: int) -> None:
    known: dict[str, None] = {}
    for count, row in enumerate(_json_rows(Shard(path), limit)):
        if isinstance(row, Row):
            known.update(dict.fromkeys(row.fields))
        elif count == 0 and row.reason == _IS_ARRAY:
            raise SourceError(f"{path} is one JSON array; write one object a line (JSON lines)")
        if count == _PEEK_ROWS:
            break
    for field in fields:
        if known and field not in known:
            raise unknown_field(path, field, list(known))


def _json_shards(path: str) -> list[Shard]:
    """Cut a large local file into parts; a line belongs to the part in which it starts."""
    can_seek = not is_store(path) and not split_endings(path)[1]
    if not can_seek or os.path.getsize(path) <= PART_BYTES:
        return [Shard(path)]
    size, shards, newlines = os.path.getsize(path), [], 0
    with open(path, "rb") as file:
        for start in range(0, size, PART_BYTES):
            shards.append(Shard(path, start, min(start + PART_BYTES, size), newlines + 1))
            newlines += file.read(PART_BYTES).count(b"\n")
    return shards


def _json_rows(shard: Shard, limit: int) -> Iterator[Row | BadRow]:
    for number, line, length in _lines(shard, limit):
        if line is None:
            yield BadRow(shard.name, number, f"line of {length} bytes, over the limit of {limit}")
            continue
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield _parse_line(line, shard.name, number)


def _lines(shard: Shard, limit: int) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield number, content (None if over the limit) and length of each line of a shard."""
    number, position = shard.first_row, 0
    try:
        with open_unpacked(shard.name) as file:
            if shard.start:
                position, number = _skip_to_line_start(file, shard)
            while shard.stop is None or position < shard.stop:
                line, length = read_line(file, limit)
                if not length:
                    return
                yield number, line, length
                position, number = position + length, number + 1
    except READ_ERRORS as error:
        raise SourceError(f"{shard.name} cannot be read at row {number}: {error}") from error


def _skip_to_line_start(file: Any, shard: Shard) -> tuple[int, int]:
    file.seek(shard.start - 1)
    rest = file.readline()  # of the line before; only its end, if it ends just there
    return shard.start - 1 + len(rest), shard.first_row + (len(rest) > 1)


def _parse_line(line: bytes, source: str, number: int) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(source, number, f"invalid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadRow(source, number, f"broken JSON: {error}")
    if isinstance(value, list):
        return BadRow(source, number, _IS_ARRAY)
    if not isinstance(value, dict):
        return BadRow(source, number, f"JSON {type(value).__name__}, not an object")
    return Row(value, source, number)
