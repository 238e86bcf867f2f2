"""What sources are made of: shards, raw rows, documents, bad rows, and what a reader offers.
`sources` opens them; `source_files`, `source_tfds` and `source_huggingface` read them."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class SourceError(ValueError):
    """A source cannot be opened or read; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A natural unit of text; of a conversation, the contents of its messages joined."""

    text: str
    id: str  # "notes.jsonl:17"
    group: str  # what a split must not cut: a work, a film, a package
    messages: tuple[dict[str, str], ...] = ()  # of a conversation
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of its row


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that is not a document; rows count from 1."""

    source: str
    row: int
    reason: str

    def __post_init__(self) -> None:
        # It may quote the row, and that may be anything: reports want a short, printable line.
        reason = self.reason if len(self.reason) <= 300 else self.reason[:297] + "..."
        shown = (c if c.isprintable() else repr(c)[1:-1] for c in reason)
        object.__setattr__(self, "reason", "".join(shown))

    def __str__(self) -> str:
        return f"{self.source}:{self.row} {self.reason}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as the source has it, before it becomes a document; rows count from 1."""

    fields: Mapping[str, Any]
    source: str
    row: int
    group: str | None = None  # where the source knows it: a text file is its own


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a source: a file, or a range in one (bytes, row groups or rows)."""

    name: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1


@runtime_checkable
class Reader(Protocol):
    """What each kind of source offers: raw rows, in shards. Pickled into worker processes."""

    def check(self, fields: Sequence[str]) -> None:
        """Raise a SourceError, within a second, if these fields cannot be read."""

    def shards(self) -> list[Shard]:
        """Return all parts in a fixed order, fetching the data if need be."""

    def rows(self, shard: Shard, fields: Sequence[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a part, with at least these fields."""

    def fingerprint(self) -> str:
        """Return what changes when the data changes: names, sizes, versions."""

    def known_groups(self) -> list[str] | None:
        """Return all groups, where they are known without reading the data."""


def unknown_field(where: str, field: str, known: Sequence[str]) -> SourceError:
    """Return the error for a field that a source does not have."""
    return SourceError(
        f"{where} has no field {field!r}; it has {', '.join(known)}: set the source's …_field"
    )


def tell_rows(rows: Sequence[BadRow | str], what: str, limit: int = 3) -> str:
    """Return "5 bad rows left out: a.jsonl:2 no field 'text'; …": how many, and the first of them.

    `rows` are bad rows, or ids of rows ("file:row") where `what` says the reason.
    """
    named = [str(row) for row in rows[:limit]] + ["…"] * (len(rows) > limit)
    return f"{len(rows)} {what}" + (f": {'; '.join(named)}" if named else "")


def nearest(name: str, names: Sequence[str]) -> str:
    """Return a hint at the most similar names, or an empty string."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
