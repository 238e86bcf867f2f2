"""The human feedback of a source: read, joined by prompt, split by prompt, repeats dropped."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.data.builders.grouping import hash_fraction
from llm.data.config import ComparisonsConfig
from llm.data.feedback import Feedback, from_row, join
from llm.data.feedback_rows import FeedbackError
from llm.data.rows import BadRow, Row, SourceError, nearest
from llm.data.shard_writer import BadRowsError
from llm.data.sources import Source, Split, describe, open_source

# All fields that the kinds of feedback have.
_FIELDS = (
    "prompt", "instruction", "chosen", "rejected", "margin", "responses", "response", "ranks",
    "ranking", "ratings", "rating", "completions", "completion", "labels", "label", "edited",
    "edit", "correction",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FeedbackSet:
    """The feedback of one split, and what was left out of it."""

    records: tuple[Feedback, ...]
    bad_rows: tuple[BadRow, ...]
    num_repeated: int
    num_without_pairs: int  # one response, or all levels equal: nothing to compare


def load_feedback(
    config: ComparisonsConfig, split: Split = "train", *, pairs_only: bool = True
) -> FeedbackSet:
    """Return the feedback of a split: each prompt is on one side, and repeats are dropped.

    Ratings of one prompt are put together, whichever rows they came in, and so are thumbs; rows of
    these that say the same again count as more votes, not as repeats. The source's system message
    goes before prompts that have none.

    Args:
      pairs_only: leave out records without a better and a worse response. KTO can learn from them,
        and a loss that knows ties from those.

    Raises:
      BadRowsError: more than config.max_bad_rows rows are bad.
      SourceError: the source cannot be read, or not split or renamed as the config says.
      ValueError: nothing is left that could be learnt from.
    """
    source = open_source(config.source, split, config.cache_dir)
    _check_source(config, source)
    parts: dict[tuple[str, str], list[Feedback]] = {}
    whole: dict[tuple, Feedback] = {}
    bad_rows: list[BadRow] = []
    num_whole = 0
    for record in _read(config, source):
        if isinstance(record, BadRow):
            bad_rows.append(record)
            _check_bad_rows(config, bad_rows)
        elif not _is_on_this_side(record, config, source.held_out):
            continue
        elif record.kind in ("rating", "thumbs"):
            parts.setdefault((record.group, record.kind), []).append(record)
        else:
            whole.setdefault((record.group, record.responses, record.levels), record)
            num_whole += 1
    records = (*whole.values(), *map(join, parts.values()))
    paired = tuple(record for record in records if record.num_pairs)
    kept = paired if pairs_only else records
    if not kept:
        raise ValueError(
            f"{split} feedback of {describe(config.source)}: of {len(records)} records none has a "
            f"better and a worse response, and {len(bad_rows)} rows are bad; see the source's "
            f"paths, split and validation_fraction={config.source.validation_fraction}"
        )
    repeated, without = num_whole - len(whole), len(records) - len(paired)
    return FeedbackSet(kept, tuple(bad_rows), repeated, without)


def _read(config: ComparisonsConfig, source: Source) -> Iterator[Feedback | BadRow]:
    names = (*(config.field_names.get(ours, ours) for ours in _FIELDS), *config.source.kept_fields)
    for shard in source.shards():
        for row in source.rows(shard, tuple(dict.fromkeys(names))):
            yield row if isinstance(row, BadRow) else _record(row, config)


def _record(row: Row, config: ComparisonsConfig) -> Feedback | BadRow:
    try:
        fields = _renamed(row.fields, config.field_names)
        record = from_row(fields, config.kind, f"{row.source}:{row.row}")
    except FeedbackError as error:
        return BadRow(row.source, row.row, str(error))
    except RecursionError:
        return BadRow(row.source, row.row, "values are nested too deeply")
    system = config.source.system_message
    if system and record.prompt[0]["role"] != "system":
        prompt = ({"role": "system", "content": system}, *record.prompt)
        record = dataclasses.replace(record, prompt=prompt)
    return record


def _renamed(fields: Mapping[str, Any], theirs: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with our names; a field whose name another one takes gives way."""
    ours = {name: our for our, name in theirs.items()}
    return {
        ours.get(name, name): value
        for name, value in fields.items()
        if name in ours or name not in theirs
    }


def _check_source(config: ComparisonsConfig, source: Source) -> None:
    """See, before anything is read, that what the config says has an effect."""
    for ours in config.field_names:
        if ours not in _FIELDS:
            raise SourceError(
                f"comparisons.field_names has {ours!r}, which is no field of feedback"
                f"{nearest(ours, _FIELDS)}; the fields are {', '.join(_FIELDS)}"
            )
    source.reader.check(tuple(config.field_names.values()))
    if config.source.group_field and source.held_out is not None:
        raise SourceError(
            f"comparisons.source.group_field is {config.source.group_field!r}, but feedback is "
            "held out by prompts: leave it empty, or name a validation_split or validation_paths"
        )


def _check_bad_rows(config: ComparisonsConfig, bad_rows: Sequence[BadRow]) -> None:
    if len(bad_rows) > config.max_bad_rows:
        first = "; ".join(map(str, bad_rows[:3]))
        raise BadRowsError(
            f"feedback of {describe(config.source)} has more than comparisons.max_bad_rows="
            f"{config.max_bad_rows} bad rows, the first: {first}. Mend the data, rename fields "
            "with comparisons.field_names, or raise comparisons.max_bad_rows"
        )


def _is_on_this_side(record: Feedback, config: ComparisonsConfig, held_out: bool | None) -> bool:
    if held_out is None:
        return True
    return (hash_fraction(record.group) < config.source.validation_fraction) == held_out
