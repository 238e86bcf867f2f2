"""Text to token ids and back: one frozen wrapper around a Hugging Face `tokenizers` tokenizer.
Byte-level BPE trained here, any tokenizer.json, GPT-2's files and raw bytes are all this class."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from etils import epath

from llm.data.chat import (
    MARKS,
    Messages,
    map_strings,
    render_template,
    render_with_spans,
    strings,
)

# Names of begin and end tokens where a bare tokenizer.json does not tell them.
_KNOWN_BOS = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>", "[CLS]")
_KNOWN_EOS = ("<|eos|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|endoftext|>", "[SEP]")
TOKEN_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")
TOKEN_FIELDS += ("mask_token",)


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or lacks what is asked of it."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as two texts: what `tokenizer.json` holds, and the settings beside it.

    Control tokens (BOS, EOS, chat markers) never come out of text: `encode` takes a spelled
    "<|eos|>" for seven characters. Only `encode(…, control=True)` and chat templates write them.
    """

    definition: str  # the content of tokenizer.json
    settings: str  # the content of tokenizer_config.json, the chat template included

    @classmethod
    def make(cls, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> "Tokenizer":
        """Return the tokenizer of a backend, with the fields of tokenizer_config.json."""
        backend.no_padding()
        backend.no_truncation()
        return cls(backend.to_str(), json.dumps(settings, ensure_ascii=False, sort_keys=True))

    # --- Text ---------------------------------------------------------------------------------

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text, without BOS and EOS.

        With `control`, spelled control tokens become their ids, as `transformers` does: for text
        of one's own making only, never for data.
        """
        if control:
            return self._control_backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for piece in self._safe_pieces(text):
            ids += self._text_backend.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, on several threads."""
        if self._leaks is not None:
            return [self.encode(text) for text in texts]
        # _fast: without the offsets that nobody reads.
        encodings = self._text_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt], *, skip_control: bool = False) -> str:
        """Return the text of ids; ids of the padded vocabulary have none."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._control_backend.decode(known, skip_special_tokens=skip_control)

    # --- Chat ---------------------------------------------------------------------------------

    def render_chat(
        self, messages: Messages, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Return the text of a conversation, as `transformers` renders this tokenizer's template.

        Raises:
          TokenizerError: there is no template.
          ChatError: the template refuses the messages.
        """
        return render_template(
            self._template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.control_tokens, **variables},
        )

    def encode_chat(
        self, messages: Messages, add_generation_prompt: bool = False, **variables: Any
    ) -> list[int]:
        """Return the ids of a conversation; only the template writes control tokens.

        A control token spelled in a message stays text, so that a user cannot end his turn or
        speak as the assistant.
        """
        mark, marked = self._mark_spellings(messages)
        rendered = self.render_chat(marked, add_generation_prompt, **variables)
        return self._encode_rendered(rendered, mark)[0]

    def encode_chat_masked(
        self, messages: Messages, **variables: Any
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and of each whether the assistant says it, EOS
        included: `render_with_spans` tells which template says so how.

        A token counts as the assistant's if it begins where the assistant speaks. (`transformers`
        counts one that only ends there too, which no sampler could have begun.)
        """
        mark, marked = self._mark_spellings(messages)
        rendered, spans = render_with_spans(
            self._template, marked, **{**self.control_tokens, **variables}
        )
        ids, starts = self._encode_rendered(rendered, mark)
        edges = [edge for span in spans for edge in span]
        return ids, (np.searchsorted(edges, starts, side="right") % 2 == 1).tolist()

    def _mark_spellings(self, messages: Messages) -> tuple[str, Messages]:
        """Return a mark, and messages with it inside every spelled control token."""
        texts = [value for message in messages for value in strings(message)]
        mark = next(m for m in MARKS if not any(m in text for text in texts))
        if not any(self._control_pattern.search(text) for text in texts):
            return mark, messages
        return mark, [map_strings(message, lambda t: self._mark(t, mark)) for message in messages]

    def _encode_rendered(self, rendered: str, mark: str) -> tuple[list[int], list[int]]:
        """Return the ids of a rendered chat, and where in it each begins (in characters)."""
        if mark not in rendered:
            encoding = self._control_backend.encode(rendered, add_special_tokens=False)
            return encoding.ids, [start for start, _ in encoding.offsets]
        spellings = "|".join(re.escape(self._mark(t, mark)) for t in self._controls_long_first)
        ids: list[int] = []
        starts: list[int] = []
        begin = 0
        # Odd pieces are marked spellings; a mark alone is left where a template cut one in two.
        for i, piece in enumerate(re.split(f"({spellings}|{mark})", rendered)):
            text = piece.replace(mark, "")
            if i % 2:  # all of a spelling begins where it does
                ids += self.encode(text)
            elif text:
                encoding = self._control_backend.encode(text, add_special_tokens=False)
                ids += encoding.ids
                starts += [begin + start for start, _ in encoding.offsets]
            starts += [begin] * (len(ids) - len(starts))
            begin += len(piece)
        return ids, starts

    def _mark(self, text: str, mark: str) -> str:
        return self._control_pattern.sub(lambda match: match[0][:1] + mark + match[0][1:], text)

    # --- Facts --------------------------------------------------------------------------------

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        ids = self._control_backend.get_vocab(with_added_tokens=True).values()
        return max(ids, default=-1) + 1

    @functools.cached_property
    def eos_id(self) -> int:
        """The id that ends a document, and a turn of chat."""
        return self._id_of("eos_token", "sep_token", known=_KNOWN_EOS)

    @functools.cached_property
    def bos_id(self) -> int:
        """The id that begins a document: EOS where the tokenizer has no BOS."""
        try:
            return self._id_of("bos_token", "cls_token", known=_KNOWN_BOS)
        except TokenizerError:
            return self.eos_id

    @functools.cached_property
    def text_prefix(self) -> tuple[int, ...]:
        """The ids before a text that its model expects, as `transformers` puts them: BOS or none.

        Not every model knows its BOS as a beginning: SmolLM2's is the mark of a chat turn.
        """
        encoding = self._control_backend.encode("a", add_special_tokens=True)
        marks = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(token for token, _ in itertools.takewhile(lambda pair: pair[1], marks))

    @functools.cached_property
    def pad_id(self) -> int | None:
        """The id that fills up batches, if there is one."""
        name = self.control_tokens.get("pad_token")
        return None if name is None else self._control_backend.token_to_id(name)

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template."""
        return self._config.get("chat_template")

    @property
    def _template(self) -> str:
        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template: the model is not for chat")
        return self.chat_template

    def with_chat_template(self, template: str) -> "Tokenizer":
        """Return the same tokenizer with another chat template."""
        settings = {**self._config, "chat_template": template}
        return Tokenizer(self.definition, json.dumps(settings, ensure_ascii=False, sort_keys=True))

    @functools.cached_property
    def control_tokens(self) -> dict[str, str]:
        """Roles and spellings of the control tokens: {"bos_token": "<|bos|>", …}."""
        tokens = {name: self._config.get(name) for name in TOKEN_FIELDS}
        spelled = {k: v["content"] if isinstance(v, dict) else v for k, v in tokens.items()}
        return {name: token for name, token in spelled.items() if token is not None}

    @functools.cached_property
    def control_ids(self) -> tuple[int, ...]:
        """The ids that text never becomes, in order."""
        return tuple(sorted(self.token_id(token) for token in self._controls_long_first))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all that defines the tokenizer."""
        return hashlib.sha256(f"{self.definition}\0{self.settings}".encode()).hexdigest()

    def token_id(self, token: str) -> int:
        """Return the id of a token by its spelling.

        Raises:
          TokenizerError: the vocabulary does not have it.
        """
        found = self._control_backend.token_to_id(token)
        if found is None:
            raise TokenizerError(f"the tokenizer has no token {token!r}")
        return found

    def save(self, directory: epath.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers` loads too."""
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.definition)
        settings = json.dumps(self._config, ensure_ascii=False, indent=2, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(settings + "\n")

    # --- Inside -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, str]:
        return {"definition": self.definition, "settings": self.settings}

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return json.loads(self.settings)

    @functools.cached_property
    def _control_backend(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.definition)

    @functools.cached_property
    def _text_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.definition)
        backend.encode_special_tokens = True  # that is: as text. Not kept in tokenizer.json.
        return backend

    @functools.cached_property
    def _controls_long_first(self) -> list[str]:
        added = self._control_backend.get_added_tokens_decoder().values()
        return sorted((token.content for token in added if token.special), key=len, reverse=True)

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._controls_long_first)) or r"(?!)")

    @functools.cached_property
    def _leaks(self) -> re.Pattern[str] | None:
        """Control tokens that even plain text turns into: they are words of some vocabularies."""
        leaks = [
            token
            for token in self._controls_long_first
            if self.token_id(token)
            in self._text_backend.encode(token, add_special_tokens=False).ids
        ]
        return re.compile("|".join(map(re.escape, leaks))) if leaks else None

    def _safe_pieces(self, text: str) -> list[str]:
        """Cut a text inside every spelling that would become a control token as one piece."""
        if self._leaks is None:
            return [text]
        cuts = [match.start() + 1 for match in self._leaks.finditer(text)]
        edges = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [text[start:stop] for start, stop in edges]

    def _id_of(self, *fields: str, known: Sequence[str]) -> int:
        named = [self.control_tokens[f] for f in fields if f in self.control_tokens]
        if not self.control_tokens:  # a bare tokenizer.json
            named = [name for name in known if name in self._controls_long_first]
        for name in named:
            found = self._control_backend.token_to_id(name)
            if found is not None:
                return found
        raise TokenizerError(
            f"the tokenizer has no {fields[0]}; name one in tokenizer_config.json "
            f"(its control tokens: {', '.join(self._controls_long_first) or 'none'})"
        )
