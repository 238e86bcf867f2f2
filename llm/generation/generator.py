"""Text in, text out: a model, its tokenizer and one way of sampling. Generation floor."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Key

from llm.data.tokenizers import Tokenizer, TokenizerError
from llm.generation.config import SamplingConfig
from llm.generation.decode import make_decoder, make_generate
from llm.generation.prompts import pad_prompts, sequence_keys
from llm.generation.text import TextStream
from llm.models.transformer import Transformer
from llm.models.unstack import unstack, unstacked
from llm.parallel.rules import constrain

# Tokens that end a document or a turn of chat; a tokenizer's EOS is often only one of several.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "</s>")

CHUNK_TOKENS = 4  # a stream's tokens a call: enough to hide the call, few enough to flow


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt."""

    text: str
    tokens: list[int]  # EOS included
    log_probs: list[float]  # of those tokens, in nats, under softmax(logits / temperature)
    finished: bool  # ended by itself, not by the limit


class Generator:
    """Completes texts and token sequences. Compiles once for each bucket of prompt lengths.

    For many calls with the same parameters, give it `unstacked(model)` and `unstack`ed parameters.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        ids = dict(eos_ids=stop_ids(tokenizer), pad_id=tokenizer.eos_id)
        generate = make_generate(model, sampling, **ids)

        @jax.jit
        def complete(*arguments):
            # whole on every host, however the parameters lie
            return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), generate(*arguments))

        prefill, advance = make_decoder(unstacked(model), sampling, **ids)

        def start(*arguments):
            return _with_reply(prefill(*arguments))

        def go_on(params, state):
            return _with_reply(advance(params, state, CHUNK_TOKENS))

        self._complete, self._start = complete, jax.jit(start)
        self._unstack = jax.jit(lambda params: unstack(model, params))
        self._go_on = jax.jit(go_on, donate_argnums=1)

    def __call__(
        self, params: dict, prompts: Sequence[str], key: Key[Array, ""] | None = None
    ) -> list[str]:
        """Return the text that follows each prompt; `key` is needed unless temperature is 0."""
        ids = [self.encode(prompt) for prompt in prompts]
        return [completion.text for completion in self.complete(params, ids, key)]

    def encode(self, prompt: str) -> list[int]:
        """Return a prompt's tokens, begun as the tokenizer begins a text: by BOS or by nothing."""
        ids = [*self.tokenizer.text_prefix, *self.tokenizer.encode(prompt)]
        return ids or [self.tokenizer.bos_id]  # a model must be asked something

    def complete(
        self, params: dict, prompts: Sequence[Sequence[int]], key: Key[Array, ""] | None = None
    ) -> list[Completion]:
        """Return the completions of prompts given as tokens, computed as one batch.

        The i-th depends on its own prompt, `key` and i alone.
        """
        out = self._complete(params, *self._batch(prompts, key))
        columns = (out.tokens, out.log_probs, out.lengths, out.finished)
        rows = zip(*(np.asarray(x).tolist() for x in columns), strict=True)
        return [
            Completion(
                self.tokenizer.decode(tokens[:length], skip_control=True),
                tokens[:length],
                log_probs[:length],
                finished,
            )
            for tokens, log_probs, length, finished in rows
        ]

    def stream(
        self, params: dict, prompt: Sequence[int], key: Key[Array, ""] | None = None
    ) -> Iterator[str]:
        """Yield the completion of one prompt in pieces of whole characters, as they come.

        Joined they are what `complete` returns for the same key.
        """
        text = TextStream(lambda ids: self.tokenizer.decode(ids, skip_control=True))
        params = self._unstack(params)
        state, reply = self._start(params, *self._batch([prompt], key))
        given, done = 0, False
        while not done:
            tokens, length, finished = jax.tree.map(np.asarray, reply)
            done = finished or length == self.sampling.max_new_tokens
            if not done:  # on its way while this piece is read
                state, reply = self._go_on(params, state)
            piece = text.push(tokens[given:length].tolist())
            given = length
            if piece:
                yield piece
        if rest := text.finish():
            yield rest

    def _batch(self, prompts: Sequence[Sequence[int]], key: Key[Array, ""] | None):
        """Return padded prompts, lengths and keys, refusing what the model cannot do."""
        if key is None:
            if self.sampling.temperature > 0:
                raise ValueError(
                    f"temperature={self.sampling.temperature} draws at random: give a key"
                )
            key = jax.random.key(0)
        config, longest = self.model.config, max(map(len, prompts), default=0)
        needed = longest + self.sampling.max_new_tokens - 1  # the last token is not fed back
        if config.positions == "learned" and needed > config.max_length_tokens:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={self.sampling.max_new_tokens} "
                f"need {needed} positions; the model has {config.max_length_tokens}"
            )
        return *pad_prompts(prompts, self.tokenizer.eos_id), sequence_keys(key, len(prompts))


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a text: the tokenizer's EOS and whatever else ends a turn."""
    ids = {tokenizer.eos_id}
    for token in _ENDS:
        try:
            ids.add(tokenizer.token_id(token))
        except TokenizerError:
            continue
    return tuple(sorted(ids))


def _with_reply(state):
    """Return a state, and copies of what a reader wants: the state is about to be donated."""
    out = state.generation
    return state, (out.tokens[0], out.lengths[0], out.finished[0])
