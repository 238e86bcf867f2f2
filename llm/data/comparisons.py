"""Batches of human feedback: prompts with several responses each, as arrays of fixed shape.
One integer is the whole state, as in `loader`."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from llm.data.builders.grouping import hash_fraction
from llm.data.config import ComparisonsConfig
from llm.data.conversations import Messages
from llm.data.feedback import Feedback, from_row, join
from llm.data.feedback_rows import FeedbackError
from llm.data.loader import MAX_CURSOR, Batch, local_sequences
from llm.data.packing import permutation
from llm.data.rows import BadRow, Row, SourceError, nearest
from llm.data.shard_writer import BadRowsError
from llm.data.sources import Source, Split, describe, open_source
from llm.data.tokenizers import Tokenizer

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


@dataclasses.dataclass(frozen=True)
class EncodedFeedback:
    """A record's responses as tokens of prompt and answer, those that fit."""

    rows: tuple[Int32[np.ndarray, " _"], ...]
    starts: tuple[int, ...]  # of each row, tokens before the answer's
    levels: tuple[float, ...]
    margin: float
    id: str


def encode_feedback(
    records: Sequence[Feedback],
    tokenizer: Tokenizer,
    length_tokens: int,
    *,
    pairs_only: bool = True,
) -> tuple[list[EncodedFeedback], list[str]]:
    """Return records as tokens, and the ids of those that lost what did not fit: all or a part.

    With `pairs_only`, records without a pair (any more) are left out.

    Raises:
      ValueError: the chat template renders a prompt otherwise before its answer.
    """
    encoded, cut = [], []
    for record in records:
        answers = encode_answers(record.prompt, record.responses, tokenizer, record.id)
        kept = []
        for (row, start), level in zip(answers, record.levels, strict=True):
            if len(row) <= length_tokens:
                kept.append((np.array(row, np.int32), start, level))
        if len(kept) < len(record.responses):
            cut.append(record.id)
        if len({level for *_, level in kept}) > 1 or (kept and not pairs_only):
            rows, starts, levels = zip(*kept, strict=True)
            encoded.append(EncodedFeedback(rows, starts, levels, record.margin, record.id))
    return encoded, cut


def encode_answers(
    prompt: Messages, responses: Sequence[str], tokenizer: Tokenizer, identity: str
) -> list[tuple[list[int], int]]:
    """Return, for each response, the tokens of prompt and answer and where the answer's begin.

    An answer is what a sampler would add to the prompt, up to the end token: what a template puts
    behind that is left off. Losses and rewards both read these rows.

    Raises:
      ValueError: the chat template renders the prompt, called `identity`, otherwise before answers.
    """
    before = tokenizer.encode_chat(prompt, add_generation_prompt=True)
    return [_encode_answer(prompt, before, each, tokenizer, identity) for each in responses]


def _encode_answer(
    prompt: Messages, before: list[int], response: str, tokenizer: Tokenizer, identity: str
) -> tuple[list[int], int]:
    messages = [*prompt, {"role": "assistant", "content": response}]
    row, start = tokenizer.encode_chat(messages), len(before)
    if row[:start] != before:
        asked = tokenizer.render_chat(prompt, add_generation_prompt=True)
        if not tokenizer.render_chat(messages).startswith(asked):
            raise ValueError(
                f"{identity}: the chat template renders this prompt otherwise when an answer "
                "follows, so that answers cannot be told apart; use another template"
            )
        # The prompt's last characters and the answer's first became one token: it is the answer's.
        same = (ours == theirs for ours, theirs in zip(before, row, strict=False))
        start = next((place for place, is_same in enumerate(same) if not is_same), len(row))
    answer = row[start:]
    if tokenizer.eos_id in answer:
        end = len(row) - answer[::-1].index(tokenizer.eos_id)
        # Space behind the end token is never sampled, and a score must not be read there.
        if not tokenizer.decode(row[end:]).strip():
            row = row[:end]
    return row, start


class ComparisonBatches(Iterator[Batch]):
    """Batches of G prompts with K slots for responses of T tokens; endless, or of one pass.

    Arrays: `tokens`, `segment_ids` (0: padding), `positions` int32 and `response_mask` float32
    [G, K·T], the slots side by side so that axis 0 is the one to split; `levels` float32 and
    `present` bool [G, K]; `margins` float32 [G]; `cursor` uint32: prompts that all hosts consumed.
    Thumbs are levels of 1 and 0: KTO needs no other batches. The order is a function of seed and
    epoch; the last batch of one pass is filled up with rows without responses.
    """

    def __init__(
        self,
        records: Sequence[EncodedFeedback],
        config: ComparisonsConfig,
        *,
        one_pass: bool = False,
        host_index: int = 0,
        host_count: int = 1,
    ):
        if not records:
            raise ValueError(
                f"no feedback fits into comparisons.length_tokens={config.length_tokens}; raise it"
            )
        if config.batch_prompts % host_count:
            raise ValueError(
                f"comparisons.batch_prompts {config.batch_prompts} is not divisible by "
                f"{host_count} hosts; try {-(-config.batch_prompts // host_count) * host_count}"
            )
        self.records = records
        self._config = config
        self._end = len(records) if one_pass else MAX_CURSOR
        self._local = local_sequences(config.batch_prompts, host_index, host_count)
        self._host_index = host_index
        self._cursor = 0
        # A batch reads one epoch, or the end of one and the start of the next.
        self._order = functools.lru_cache(2)(self._epoch_order)

    def __next__(self) -> Batch:
        if self._cursor >= self._end:
            raise StopIteration
        first = self._cursor + self._host_index * self._local
        batch = self._empty()
        for row, place in enumerate(range(first, min(first + self._local, self._end))):
            epoch, index = divmod(place, len(self.records))
            self._fill(batch, row, int(self._order(epoch)[index]), epoch)
        self._cursor = min(self._cursor + self._config.batch_prompts, self._end)
        batch["cursor"] = np.uint32(self._cursor)
        return batch

    def seek(self, cursor: int) -> None:
        """Go on as if exactly `cursor` prompts had been consumed by all hosts."""
        if not 0 <= int(cursor) <= self._end:
            raise ValueError(f"cursor {cursor} lies outside the data, 0 to {self._end} prompts")
        self._cursor = int(cursor)

    def close(self) -> None:
        """Nothing to stop; as `loader.Batches` has it."""

    def _epoch_order(self, epoch: int) -> Int64[np.ndarray, " records"]:
        return permutation(len(self.records), "comparisons", self._config.seed, epoch)

    def _empty(self) -> Batch:
        slots = self._config.max_responses
        wide = (self._local, slots * self._config.length_tokens)
        return {
            "tokens": np.zeros(wide, np.int32),
            "segment_ids": np.zeros(wide, np.int32),
            "positions": np.zeros(wide, np.int32),
            "response_mask": np.zeros(wide, np.float32),
            "levels": np.zeros((self._local, slots), np.float32),
            "present": np.zeros((self._local, slots), bool),
            "margins": np.zeros(self._local, np.float32),
        }

    def _fill(self, batch: Batch, row: int, index: int, epoch: int) -> None:
        record, length = self.records[index], self._config.length_tokens
        batch["margins"][row] = record.margin
        for slot, chosen in enumerate(self._choose(record, index, epoch)):
            tokens = record.rows[chosen]
            start = slot * length
            if self._config.pad_left:
                start += length - len(tokens)
            here = slice(start, start + len(tokens))
            batch["tokens"][row, here] = tokens
            batch["segment_ids"][row, here] = 1
            batch["positions"][row, here] = np.arange(len(tokens))
            batch["response_mask"][row, start + record.starts[chosen] : here.stop] = 1.0
            batch["levels"][row, slot] = record.levels[chosen]
            batch["present"][row, slot] = True

    def _choose(self, record: EncodedFeedback, index: int, epoch: int) -> list[int]:
        """Return which responses take the slots: of many a draw, the best and the worst in it."""
        if len(record.rows) <= self._config.max_responses:
            return list(range(len(record.rows)))
        seed = self._config.seed
        order = permutation(len(record.rows), "responses", seed, epoch, index).tolist()
        levels = np.array(record.levels)[order]
        first = list(dict.fromkeys([int(levels.argmax()), int(levels.argmin())]))
        rest = [place for place in range(len(order)) if place not in first]
        return [order[place] for place in (*first, *rest)[: self._config.max_responses]]
