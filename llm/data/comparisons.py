"""Batches of human feedback: prompts with several responses each, as arrays of fixed shape.
One integer is the whole state, as in `loader`."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from llm.data.chat import ChatError
from llm.data.config import ComparisonsConfig
from llm.data.conversations import Messages
from llm.data.feedback import Feedback
from llm.data.loader import MAX_CURSOR, Batch, local_sequences
from llm.data.packing import permutation
from llm.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedFeedback:
    """A record's responses as tokens of prompt and answer, those that fit."""

    rows: tuple[Int32[np.ndarray, " _"], ...]
    starts: tuple[int, ...]  # of each row, tokens before the answer's
    levels: tuple[float, ...]
    margin: float
    id: str

    @property
    def answers(self) -> tuple[bytes, ...]:
        """The responses without their prompt."""
        return tuple(r[start:].tobytes() for r, start in zip(self.rows, self.starts, strict=True))


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
      ValueError: the chat template refuses the prompt, called `identity`, or renders it otherwise
        before answers.
    """
    try:
        before = tokenizer.encode_chat(prompt, add_generation_prompt=True)
        return [_encode_answer(prompt, before, each, tokenizer, identity) for each in responses]
    except ChatError as error:
        raise ChatError(f"{identity}: {error}") from error


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


def spread(records: Sequence[EncodedFeedback], slots: int, seed: int = 0) -> list[EncodedFeedback]:
    """Return records of at most `slots` responses each, which hold all responses, in order.

    Of many responses `ComparisonBatches` takes the best and the worst, which are easier to tell
    apart than others: held-out figures are to see them all. A record's responses are shuffled,
    since rankings list like beside like.
    """
    pieces = []
    for index, record in enumerate(records):
        order = permutation(len(record.rows), "spread", seed, index)
        for part in np.array_split(order, -(-len(order) // slots)):
            kept = ((record.rows[i], record.starts[i], record.levels[i]) for i in part.tolist())
            rows, starts, levels = zip(*kept, strict=True)
            pieces.append(dataclasses.replace(record, rows=rows, starts=starts, levels=levels))
    return pieces


def empty_batch(num_prompts: int, config: ComparisonsConfig) -> Batch:
    """Return the arrays of so many prompts without a response; the cursor is left out."""
    slots = config.max_responses
    wide = (num_prompts, slots * config.length_tokens)
    return {
        "tokens": np.zeros(wide, np.int32),
        "segment_ids": np.zeros(wide, np.int32),
        "positions": np.zeros(wide, np.int32),
        "response_mask": np.zeros(wide, np.float32),
        "levels": np.zeros((num_prompts, slots), np.float32),
        "present": np.zeros((num_prompts, slots), bool),
        "margins": np.zeros(num_prompts, np.float32),
    }


class ComparisonBatches(Iterator[Batch]):
    """Batches of G prompts with K slots for responses of T tokens; endless, or of one pass.

    Arrays: `tokens`, `segment_ids` (0: padding), `positions` int32 and `response_mask` float32
    [G, K·T], the slots side by side so that axis 0 is the one to split; `levels` float32 and
    `present` bool [G, K]; `margins` float32 [G]; `cursor` uint32: prompts that all hosts consumed.
    Thumbs are levels of 1 and 0: KTO needs no other batches. The order is a function of seed and
    epoch; one pass keeps the records' own, and its last batch is filled up with rows without
    responses.

    Records that compare the same responses ("write a good one", "write a bad one") follow each
    other and draw the same of them. What a response is by itself, preferred here and not there,
    then cancels within a batch, and how it answers its prompt is left: without that a reward model
    of opposite instructions stayed at chance for hundreds of steps.
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
        self._one_pass = one_pass
        self._end = len(records) if one_pass else MAX_CURSOR
        self._local = local_sequences(config.batch_prompts, host_index, host_count)
        self._host_index = host_index
        self._cursor = 0
        families: dict[tuple[bytes, ...], list[int]] = {}
        for index, record in enumerate(records):
            families.setdefault(tuple(sorted(record.answers)), []).append(index)
        self._families = list(families.values())
        self._family_of = {i: number for number, f in enumerate(self._families) for i in f}
        # A batch reads one epoch, or the end of one and the start of the next.
        self._order = functools.lru_cache(2)(self._epoch_order)

    def __next__(self) -> Batch:
        if self._cursor >= self._end:
            raise StopIteration
        first = self._cursor + self._host_index * self._local
        batch = empty_batch(self._local, self._config)
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
        if self._one_pass:
            return np.arange(len(self.records))
        order = permutation(len(self._families), "comparisons", self._config.seed, epoch)
        return np.concatenate([self._families[family] for family in order.tolist()])

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
        seed, family = self._config.seed, self._family_of[index]
        # By what they say, so that a family whose records list them otherwise draws the same.
        named = sorted(range(len(record.rows)), key=record.answers.__getitem__)
        drawn = permutation(len(record.rows), "responses", seed, epoch, family)
        order = [named[place] for place in drawn.tolist()]
        levels = np.array(record.levels)[order]
        first = list(dict.fromkeys([int(levels.argmax()), int(levels.argmin())]))
        rest = [place for place in range(len(order)) if place not in first]
        return [order[place] for place in (*first, *rest)[: self._config.max_responses]]
