"""The prompts of a policy-gradient run: read, encoded, and dealt out in a fixed order. Third floor.
One integer is the whole state: how many prompts were dealt."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm.data.chat import ChatError
from llm.data.config import SourceConfig
from llm.data.packing import permutation
from llm.data.rows import BadRow, Document, tell_rows
from llm.data.shard_writer import check_bad_rows
from llm.data.sources import describe, open_source
from llm.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked: messages up to the turn to be written, and the row they come from."""

    messages: tuple[dict[str, str], ...]
    tokens: tuple[int, ...]  # with the marker that asks for the assistant's turn
    fields: Mapping[str, Any]  # of the row: an answer to check against, perhaps
    id: str  # "file:row"

    @property
    def text(self) -> str:
        """The last thing said."""
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """All prompts, and what was left out."""

    prompts: tuple[Prompt, ...]
    too_long: tuple[str, ...]  # ids
    bad_rows: tuple[BadRow, ...]
    max_tokens: int  # that were allowed

    @property
    def digest(self) -> str:
        """SHA-256 over the prompts in their order, and the fields that answers are checked with."""
        facts = [
            (p.tokens, sorted((k, repr(x)) for k, x in p.fields.items())) for p in self.prompts
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def left_out(self) -> list[str]:
        """Return a line for each kind of row that was left out: how many, and the first of them."""
        return [
            tell_rows(rows, what)
            for rows, what in (
                (self.too_long, f"prompts longer than {self.max_tokens} tokens left out"),
                (self.bad_rows, "bad rows left out"),
            )
            if rows
        ]

    def width(self, multiple: int = 8) -> int:
        """Return the tokens of a row that every prompt fits into: a multiple, or max_tokens."""
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        return min(self.max_tokens, -(-longest // multiple) * multiple)


def load_prompts(
    config: SourceConfig,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    max_bad_rows: int,
    split: str = "train",
    cache_dir: str = "",
) -> PromptSet:
    """Return the prompts of a source, each text once: a row's turns before its last answer.

    Raises:
      BadRowsError: more than max_bad_rows rows are no prompts.
      ValueError: no prompt is left.
    """
    source = open_source(config, split, cache_dir)
    found: dict[tuple[int, ...], Prompt] = {}
    too_long: list[str] = []
    bad_rows: list[BadRow] = []
    for shard in source.shards():
        for document in source.read(shard, answered=False):
            if isinstance(document, BadRow):
                bad_rows.append(document)
                check_bad_rows("prompts", bad_rows, max_bad_rows)
                continue
            try:
                prompt = _to_prompt(document, config, tokenizer)
            except ChatError as error:
                source_name, _, row = document.id.rpartition(":")
                bad_rows.append(BadRow(source_name, int(row), str(error)))
                check_bad_rows("prompts", bad_rows, max_bad_rows)
                continue
            if len(prompt.tokens) > max_tokens:
                too_long.append(prompt.id)
            else:
                found.setdefault(prompt.tokens, prompt)
    if not found:
        raise ValueError(
            f"no prompts are left of {describe(config)}: {len(too_long)} are longer than "
            f"rollout.prompt_tokens={max_tokens}, {len(bad_rows)} rows are bad"
        )
    return PromptSet(tuple(found.values()), tuple(too_long), tuple(bad_rows), max_tokens)


def _to_prompt(document: Document, config: SourceConfig, tokenizer: Tokenizer) -> Prompt:
    """Return what a document asks: a text as the user says it, or the turns before the answer."""
    messages = document.messages
    if not messages:
        messages = ({"role": "user", "content": document.text},)
        if config.system_message:
            messages = ({"role": "system", "content": config.system_message}, *messages)
    while messages[-1]["role"] == "assistant" and len(messages) > 1:
        messages = messages[:-1]
    tokens = tuple(tokenizer.encode_chat(messages, add_generation_prompt=True))
    fields = {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in document.fields.items()
    }
    return Prompt(messages, tokens, fields, document.id)


class PromptBatches(Iterator[list[Prompt]]):
    """Deals prompts, each once an epoch, in an order that the seed decides; never ends."""

    def __init__(self, prompts: Sequence[Prompt], batch: int, seed: int):
        self._prompts, self._batch, self._seed = prompts, batch, seed
        self.cursor = 0  # prompts dealt

    def __next__(self) -> list[Prompt]:
        places = np.arange(self.cursor, self.cursor + self._batch)
        self.cursor += self._batch
        epochs, places = np.divmod(places, len(self._prompts))
        orders = {
            epoch: permutation(len(self._prompts), "prompts", self._seed, epoch)
            for epoch in np.unique(epochs).tolist()
        }
        pairs = zip(epochs.tolist(), places.tolist(), strict=True)
        return [self._prompts[orders[epoch][place]] for epoch, place in pairs]

    def seek(self, cursor: int) -> None:
        """Go on as if `cursor` prompts had been dealt."""
        self.cursor = int(cursor)
