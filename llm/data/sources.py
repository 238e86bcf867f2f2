"""Where text comes from: one door, `open_source`, to TFDS, plain files and Hugging Face data sets.
A source is a list of shards, each readable by itself, whose rows become documents or bad rows."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from llm.data.builders.grouping import hash_fraction
from llm.data.config import SourceConfig
from llm.data.conversations import (
    ConversationError,
    Messages,
    conversation_fields,
    read_conversation,
)
from llm.data.rows import BadRow, Document, Reader, Row, Shard, SourceError

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a source, opened and checked."""

    config: SourceConfig
    split: Split
    reader: Reader
    # Read the groups on this side of the hold-out; None = read all.
    held_out: bool | None

    def shards(self) -> list[Shard]:
        """Return the parts, in a fixed order. A TFDS data set not yet prepared is prepared here."""
        return self.reader.shards()

    def read(self, shard: Shard, *, answered: bool = True) -> Iterator[Document | BadRow]:
        """Yield the documents of a part that belong to this split, and every bad row of it.

        Conversations must have an assistant's turn, unless they need not be `answered`: prompts.
        With a hold-out, train and validation read the same rows: a bad row comes up in both.
        """
        for row in self.reader.rows(shard, self._fields):
            document = row if isinstance(row, BadRow) else self._document(row, answered)
            if isinstance(document, BadRow) or self._is_on_this_side(document.group):
                yield document

    def rows(self, shard: Shard, fields: Sequence[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a part as they are, with those of these fields that they have.

        There is no hold-out here: that is for the caller, who knows what a group is.
        """
        return self.reader.rows(shard, fields)

    def identity(self) -> str:
        """Return a digest of what is read that is the same for another copy of it."""
        same = getattr(self.reader, "identity", self.reader.fingerprint)()
        return self._digest(same)

    def fingerprint(self) -> str:
        """Return a digest that changes with the data, the fields read or the split."""
        return self._digest(self.reader.fingerprint())

    def _digest(self, of_data: str) -> str:
        facts = (of_data, self._fields, self.split, self.held_out)
        limits = (self.config.validation_fraction, self.config.max_document_bytes)
        form = (self.config.format, self.config.system_message)
        return hashlib.sha256(repr((facts, limits, form)).encode()).hexdigest()

    @property
    def _fields(self) -> tuple[str, ...]:
        return fields_read(self.config)

    def _document(self, row: Row, answered: bool) -> Document | BadRow:
        messages: Messages = ()
        if self.config.format == "text":
            text = _as_text(row.fields.get(self.config.text_field), self.config.text_field)
        else:
            try:
                messages = read_conversation(row.fields, self.config, answered=answered)
            except ConversationError as error:
                return BadRow(row.source, row.row, str(error))
            text = "\n\n".join(message["content"] for message in messages)
        if isinstance(text, _Fault):
            return BadRow(row.source, row.row, text.reason)
        if not text or text.isspace():
            return BadRow(row.source, row.row, "empty text")
        if messages and _has_half_pair(text):
            return BadRow(row.source, row.row, _HALF_PAIR)
        encoded = text.encode("utf-8")
        if len(encoded) > self.config.max_document_bytes:
            reason = f"{len(encoded)} bytes, more than max_document_bytes"
            return BadRow(row.source, row.row, f"{reason}={self.config.max_document_bytes}")
        group = row.group
        if group is None and self.config.group_field:
            field = self.config.group_field
            group = _as_text(row.fields.get(field), field, numbers=True)
            if isinstance(group, _Fault):
                return BadRow(row.source, row.row, group.reason)
        if group is None:
            # The text itself, not the row: stable when rows are inserted, and copies stay together.
            kept_together = _prompt(messages).encode() if messages else encoded
            group = hashlib.sha256(kept_together).hexdigest()[:16]
        return Document(text, f"{row.source}:{row.row}", group, messages, row.fields)

    def _is_on_this_side(self, group: str) -> bool:
        if self.held_out is None:
            return True
        return (hash_fraction(group) < self.config.validation_fraction) == self.held_out


def _prompt(messages: Messages) -> str:
    """Return what an assistant is first asked."""
    turns = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
    return repr([message["content"] for message in turns])


@dataclasses.dataclass(frozen=True)
class _Fault:
    reason: str


_HALF_PAIR = "not Unicode: half of a surrogate pair"


def _has_half_pair(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _as_text(value: Any, field: str, numbers: bool = False) -> str | _Fault:
    if isinstance(value, str):
        return _Fault(_HALF_PAIR) if _has_half_pair(value) else value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            return _Fault(f"invalid UTF-8 in {field!r}, byte {error.start}")
    if value is None:
        return _Fault(f"no field {field!r}")
    if numbers and (isinstance(value, int) or getattr(value, "shape", None) == ()):
        return str(value)
    return _Fault(f"field {field!r} is {type(value).__name__}, not text")


def fields_read(config: SourceConfig) -> tuple[str, ...]:
    """Return the fields that documents of a source are made of."""
    is_text = config.format == "text"
    content = (config.text_field,) if is_text else conversation_fields(config)
    return tuple(dict.fromkeys(f for f in (*content, config.group_field, *config.kept_fields) if f))


def open_source(config: SourceConfig, split: Split = "train", cache_dir: str = "") -> Source:
    """Return one split of a source, after checks that take at most about a second.

    Validation is `validation_split` (or `validation_paths`) if given; else the share
    `validation_fraction` of the groups, chosen by a hash of the group, which train leaves out.

    Raises:
      SourceError: no such file, data set, split or field, or nothing to validate on.
    """
    if split not in ("train", "validation"):
        raise SourceError(f"split is {split!r}; it must be train or validation")
    named = config.validation_paths if config.kind == "files" else config.validation_split
    held_out = None if named or config.validation_fraction == 0 else split == "validation"
    if split == "validation" and not config.has_validation:
        raise SourceError(
            f"source {describe(config)} has nothing to validate on: give validation_split, "
            "validation_paths, or a validation_fraction above 0"
        )
    reader = _make_reader(config, split == "validation" and bool(named), cache_dir)
    reader.check(fields_read(config))
    source = Source(config, split, reader, held_out)
    if held_out is not None:
        _check_hold_out(config, reader.known_groups())
    return source


def _make_reader(config: SourceConfig, named_validation: bool, cache_dir: str) -> Reader:
    # Imported here: each kind's libraries load only when it is used.
    name_of_split = config.validation_split if named_validation else config.split
    match config.kind:
        case "files":
            from llm.data.source_files import open_files

            paths = config.validation_paths if named_validation else config.paths
            return open_files(paths, config.text_field, config.max_document_bytes)
        case "tfds":
            from llm.data.source_tfds import TfdsReader

            return TfdsReader(config.name, name_of_split, cache_dir)
        case "huggingface":
            from llm.data.source_huggingface import HuggingFaceReader

            return HuggingFaceReader(config.name, name_of_split)
        case kind:
            raise SourceError(f"unknown kind of source {kind!r}")


def _check_hold_out(config: SourceConfig, groups: Sequence[str] | None) -> None:
    """Where all groups are known, see at once whether the hash leaves some on each side."""
    if groups is None:
        return
    held_out = sum(hash_fraction(group) < config.validation_fraction for group in groups)
    if held_out in (0, len(groups)):
        raise SourceError(
            f"{held_out} of the {len(groups)} text files of {describe(config)} fall into the "
            f"held-out share, validation_fraction={config.validation_fraction}: a text file is one "
            "document and is not cut; change the share, or name files in validation_paths"
        )


def describe(config: SourceConfig) -> str:
    """Return how messages call a source."""
    return config.name if config.kind != "files" else ", ".join(config.paths) or "(no paths)"
