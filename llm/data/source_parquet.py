"""Parquet files as shards and rows, for sources of kind "files".
A shard is a run of row groups; only the columns asked for are read."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from llm.data.compressed import open_unpacked
from llm.data.rows import BadRow, Row, Shard, SourceError, unknown_field


@contextlib.contextmanager
def _open_table(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    with open_unpacked(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceError(f"{path} is not a whole Parquet file: {error}") from error
        yield table


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
    with _open_table(shard.name) as table:
        stop = table.metadata.num_row_groups if shard.stop is None else shard.stop
        groups = list(range(shard.start, stop))
        batches = table.iter_batches(256, row_groups=groups, columns=list(fields))
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise SourceError(f"{shard.name} is damaged after row {number - 1}") from error
            if batch is None:
                return
            for row in _rows_of(batch):
                yield Row(row, shard.name, number)
                number += 1


def _rows_of(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    names = batch.schema.names
    columns = [_values(batch.column(index)) for index in range(batch.num_columns)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pyarrow.Array) -> list[Any]:
    """Return a column as Python values, strings as bytes: they may not be valid UTF-8."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
