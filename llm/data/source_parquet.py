"""Parquet files as shards and rows, for sources of kind "files".
A shard is a run of row groups; only the columns asked for are read."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from llm.data.compressed import open_unpacked
from llm.data.rows import BadRow, Row, Shard, SourceError, unknown_field

# What pyarrow raises on a damaged file. ArrowException's children are ValueErrors, KeyErrors, …
_ERRORS = (pyarrow.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError)


# Of rows in memory at a time.
_BATCH_ROWS, _BATCH_BYTES = 256, 2**25


@contextlib.contextmanager
def _open_table(path: str, fields: Sequence[str] = ()) -> Iterator[pyarrow.parquet.ParquetFile]:
    with open_unpacked(path) as file:
        try:
            metadata = pyarrow.parquet.read_metadata(file)
            columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
            texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY"]
            table = pyarrow.parquet.ParquetFile(
                file, metadata=metadata, read_dictionary=[name for name in texts if name in fields]
            )
            _ = table.schema_arrow
        except _ERRORS as error:
            raise SourceError(f"{path} is not a whole Parquet file: {_short(error)}") from error
        yield table


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def check_parquet(path: str, fields: Sequence[str]) -> None:
    """Raise a SourceError if the file is damaged or lacks a field."""
    with _open_table(path) as table:
        names = table.schema_arrow.names
    for field in fields:
        if field not in names:
            raise unknown_field(path, field, names)


def parquet_shards(path: str, part_bytes: int) -> list[Shard]:
    """Return runs of row groups of about `part_bytes` (unpacked)."""
    with _open_table(path) as table:
        metadata = table.metadata
    shards, start, first_row, size, rows = [], 0, 1, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        size, rows = size + group.total_byte_size, rows + group.num_rows
        if size >= part_bytes or index == metadata.num_row_groups - 1:
            shards.append(Shard(path, start, index + 1, first_row))
            start, first_row, size, rows = index + 1, first_row + rows, 0, 0
    return shards


def parquet_rows(shard: Shard, fields: Sequence[str]) -> Iterator[Row | BadRow]:
    """Yield the rows of a shard; SourceError if the file is damaged."""
    number = shard.first_row
    with _open_table(shard.name, fields) as table:
        batches = _batches(table, shard, fields)
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else _rows_of(batch)
            except _ERRORS as error:
                raise SourceError(
                    f"{shard.name} is damaged after row {number - 1}: {_short(error)}"
                ) from error
            if batch is None:
                return
            for row in rows:
                yield Row(row, shard.name, number)
                number += 1


def _batches(
    table: pyarrow.parquet.ParquetFile, shard: Shard, fields: Sequence[str]
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the row groups of a shard in batches of about `_BATCH_BYTES`, unpacked."""
    stop = table.metadata.num_row_groups if shard.stop is None else shard.stop
    for index in range(shard.start, stop):
        group = table.metadata.row_group(index)
        row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        num_rows = min(max(1, _BATCH_BYTES // row_bytes), _BATCH_ROWS)
        yield from table.iter_batches(num_rows, row_groups=[index], columns=list(fields))


def _rows_of(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    names = batch.schema.names
    columns = [_values(batch.column(index)) for index in range(batch.num_columns)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pyarrow.Array) -> list[Any]:
    """Return a column as Python values, strings as bytes: they may not be valid UTF-8."""
    if pyarrow.types.is_dictionary(column.type):
        # Not decoded: a long text that a thousand rows have would be a thousand long texts.
        values = _values(column.dictionary)
        return [None if i is None else values[i] for i in column.indices.to_pylist()]
    if pyarrow.types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
