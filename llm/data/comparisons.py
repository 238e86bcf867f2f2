"""Batches of human feedback: prompts with several responses each, as arrays of fixed shape.
One integer is the whole state, as in `loader`."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from llm.data.builders.grouping import hash_fraction
from llm.data.config import ComparisonsConfig
from llm.data.feedback import Feedback, FeedbackError, from_row, join
from llm.data.loader import Batch, local_sequences
from llm.data.packing import permutation
from llm.data.rows import BadRow
from llm.data.shard_writer import check_bad_rows
from llm.data.sources import Split, open_source
from llm.data.tokenizers import Tokenizer

# All fields that the kinds of feedback have.
_FIELDS = (
    "prompt", "instruction", "chosen", "rejected", "margin", "responses", "response", "ranks",
    "ranking", "ratings", "rating", "completions", "completion", "labels", "label", "edited",
    "correction",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FeedbackSet:
    """The feedback of one split, and what was left out of it."""

    records: tuple[Feedback, ...]
    bad_rows: tuple[BadRow, ...]
    num_repeated: int
    num_without_pairs: int  # all levels equal: nothing to compare


def load_feedback(config: ComparisonsConfig, split: Split = "train") -> FeedbackSet:
    """Return the feedback of a split: each prompt is on one side, and repeats are dropped.

    Ratings and thumbs of one prompt are put together, whichever rows they came in.

    Raises:
      BadRowsError: more than config.max_bad_rows rows are bad.
      ValueError: nothing is left that could be learnt from.
    """
    source = open_source(config.source, split, config.cache_dir)
    theirs = {ours: config.field_names.get(ours, ours) for ours in _FIELDS}
    names = (*theirs.values(), *config.source.kept_fields)
    by_prompt: dict[str, list[Feedback]] = {}
    bad_rows: list[BadRow] = []
    for shard in source.shards():
        for row in source.rows(shard, names):
            if not isinstance(row, BadRow):
                back = {name: ours for ours, name in theirs.items() if ours != name}
                fields = {back.get(name, name): value for name, value in row.fields.items()}
                try:
                    record = from_row(fields, config.kind, f"{row.source}:{row.row}")
                except FeedbackError as error:
                    row = BadRow(row.source, row.row, str(error))
            if isinstance(row, BadRow):
                bad_rows.append(row)
                check_bad_rows("comparisons", bad_rows, config.max_bad_rows)
            elif _on_this_side(record, config, source.held_out):
                by_prompt.setdefault(record.group, []).append(record)
    joined, num_repeated = [], 0
    for records in by_prompt.values():
        parts = [r for r in records if r.kind in ("rating", "thumbs")]
        whole = [r for r in records if r.kind not in ("rating", "thumbs")]
        distinct = {(r.responses, r.levels): r for r in whole}
        num_repeated += len(whole) - len(distinct)
        joined += [*distinct.values(), *([join(parts)] if parts else [])]
    paired = tuple(record for record in joined if record.num_pairs)
    if not paired:
        raise ValueError(
            f"{split} feedback: of {len(joined)} records none has a better and a worse response, "
            f"and {len(bad_rows)} rows are bad"
        )
    return FeedbackSet(paired, tuple(bad_rows), num_repeated, len(joined) - len(paired))


def _on_this_side(record: Feedback, config: ComparisonsConfig, held_out: bool | None) -> bool:
    if held_out is None:
        return True
    return (hash_fraction(record.group) < config.source.validation_fraction) == held_out


@dataclasses.dataclass(frozen=True)
class EncodedFeedback:
    """A record's responses as tokens of prompt and answer, those that fit."""

    rows: tuple[np.ndarray, ...]
    prompt_length: int  # tokens of each row that are the prompt's
    levels: tuple[float, ...]
    margin: float
    id: str


def encode_feedback(
    records: Sequence[Feedback], tokenizer: Tokenizer, length_tokens: int
) -> tuple[list[EncodedFeedback], list[str]]:
    """Return records as tokens, and the ids of those that lost what did not fit: all or a part.

    Raises:
      ValueError: the chat template renders a prompt otherwise before its answer.
    """
    encoded, cut = [], []
    for record in records:
        prompt = tokenizer.encode_chat(record.prompt, add_generation_prompt=True)
        kept = []
        for response, level in zip(record.responses, record.levels, strict=True):
            answer = {"role": "assistant", "content": response}
            row = tokenizer.encode_chat([*record.prompt, answer])
            if row[: len(prompt)] != prompt:
                raise ValueError(
                    f"{record.id}: the chat template renders this prompt otherwise when an answer "
                    "follows, so that answers cannot be told apart; use another template"
                )
            if len(row) <= length_tokens:
                kept.append((np.array(row, np.int32), level))
        if len(kept) < len(record.responses):
            cut.append(record.id)
        if len({level for _, level in kept}) > 1:
            rows, levels = zip(*kept, strict=True)
            encoded.append(EncodedFeedback(rows, len(prompt), levels, record.margin, record.id))
    return encoded, cut


class ComparisonBatches(Iterator[Batch]):
    """Batches of G prompts with K slots for responses of T tokens; endless, or of one pass.

    Arrays: `tokens`, `segment_ids` (0: padding), `positions` int32 and `response_mask` float32
    [G, K·T], the slots side by side so that axis 0 is the one to split; `levels` float32 and
    `present` bool [G, K]; `margins` float32 [G]; `cursor` uint32: prompts that all hosts consumed.
    Thumbs are levels of 1 and 0. The order is a function of seed and epoch.
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
        self.records = records
        self._config, self._one_pass = config, one_pass
        self._local = local_sequences(config.batch_prompts, host_index, host_count)
        self._host_index = host_index
        self._cursor = 0

    def __next__(self) -> Batch:
        total = len(self.records)
        if self._one_pass and self._cursor >= total:
            raise StopIteration
        first = self._cursor + self._host_index * self._local
        batch = self._empty()
        for row, place in enumerate(range(first, first + self._local)):
            if not self._one_pass or place < total:
                epoch, index = divmod(place, total)
                order = permutation(total, "comparisons", self._config.seed, epoch)
                self._fill(batch, row, int(order[index]), epoch)
        self._cursor += self._config.batch_prompts
        batch["cursor"] = np.uint32(self._cursor)
        return batch

    def seek(self, cursor: int) -> None:
        """Go on as if exactly `cursor` prompts had been consumed by all hosts."""
        self._cursor = int(cursor)

    def close(self) -> None:
        """Nothing to stop; as `loader.Batches` has it."""

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
            batch["response_mask"][row, here.start + record.prompt_length : here.stop] = 1.0
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
