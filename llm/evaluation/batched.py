"""A model that answers many requests in tokens: likelihoods and texts. Third floor.

Requests of like length come together in batches of one size and few lengths, so that few programs
are compiled. lm-evaluation-harness's tasks and BIG-bench's are both answered here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm.data.tokenizers import Tokenizer
from llm.generation.config import SamplingConfig
from llm.generation.decode import make_decoder
from llm.generation.generator import stop_ids
from llm.generation.prompts import bucket_length, pad_prompts, sequence_keys
from llm.models.transformer import Transformer, head_params
from llm.models.unstack import unstack, unstacked
from llm.objectives.tiles import map_tiles

CHUNK_TOKENS = 16  # generated between two looks at whether a text has ended


class BatchedModel:
    """Answers requests in batches of `batch_size`, each as if it were alone.

    `max_length` is the window in tokens: longer contexts lose their beginning. Draws depend on
    `seed` and a request's number alone.
    """

    def __init__(
        self,
        model: Transformer,
        params: dict,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        tile_tokens: int = 4096,
        seed: int = 0,
    ):
        super().__init__()  # of what this class is mixed with, as in harness.py
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_length = max_length or model.config.max_length_tokens
        self._model, self._mesh, self._key = model, mesh, jax.random.key(seed)
        with jax.set_mesh(mesh):
            self._params = jax.device_put(params)
        self._score = jax.jit(functools.partial(_score, model, tile_tokens))
        self._decoders: dict[SamplingConfig, tuple[Callable, Callable]] = {}

    @functools.cached_property
    def _decoding_params(self) -> dict:
        """The layers one by one, as decoding wants them: made for the first text."""
        return jax.jit(functools.partial(unstack, self._model))(self._params)

    def score_tokens(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield of each (context, continuation) its number, log p(continuation | context) in nats,
        and whether each token of the continuation was the likeliest; as they come, longest first.

        Raises:
          ValueError: a context or a continuation is empty, or a continuation exceeds the window.
        """
        rows = []
        for i, (context, continuation) in enumerate(requests):
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {i}: {len(context)} tokens of context and {len(continuation)} to "
                    f"score: needs at least one each, and at most {self.max_length} to score"
                )
            rows.append([*context, *continuation][-(self.max_length + 1) :])
        for chosen in self._batches([len(row) - 1 for row in rows]):
            length = bucket_length(max(len(rows[i]) - 1 for i in chosen))
            tokens, targets, counts = _right_padded(
                [rows[i] for i in chosen], length, self.batch_size
            )
            with jax.set_mesh(self._mesh):
                out = self._score(self._params, tokens, targets, counts)
                log_probs, greedy = jax.device_get(out)
            for row, i in enumerate(chosen):
                scored = slice(counts[row] - len(requests[i][1]), counts[row])
                nats = float(log_probs[row, scored].astype(np.float64).sum())
                yield i, (nats, bool(greedy[row, scored].all()))

    def generate_texts(
        self,
        prompts: Mapping[int, Sequence[int]],
        sampling: SamplingConfig,
        ended: Callable[[int, str], bool],
    ) -> Iterator[tuple[int, str]]:
        """Yield what follows each prompt, by number: to EOS, `ended(number, text)` or the limit.

        A text may go on beyond where it ended: cut it. The prompts' numbers seed their draws.
        """
        numbers, room = list(prompts), self.max_length - sampling.max_new_tokens
        fitting = {i: list(prompts[i])[-room:] for i in numbers}
        for batch in self._batches([len(fitting[i]) for i in numbers]):
            chosen = [numbers[row] for row in batch]
            with jax.set_mesh(self._mesh):
                texts = self._generate({i: fitting[i] for i in chosen}, sampling, ended)
            yield from zip(chosen, texts, strict=True)

    def _decoder(self, sampling: SamplingConfig) -> tuple[Callable, Callable]:
        if sampling not in self._decoders:
            ends, pad_id = stop_ids(self.tokenizer), self.tokenizer.eos_id
            prefill, advance = make_decoder(
                unstacked(self._model), sampling, eos_ids=ends, pad_id=pad_id
            )
            self._decoders[sampling] = jax.jit(prefill), jax.jit(advance, donate_argnums=1)
        return self._decoders[sampling]

    def _generate(
        self,
        prompts: Mapping[int, Sequence[int]],
        sampling: SamplingConfig,
        ended: Callable[[int, str], bool],
    ) -> list[str]:
        prefill, advance = self._decoder(sampling)
        missing = self.batch_size - len(prompts)  # one shape, however few are left
        pad_id = self.tokenizer.eos_id
        tokens, lengths = pad_prompts([*prompts.values(), *[[pad_id]] * missing], pad_id)
        # a request's own key, whatever batch it came into
        keys = sequence_keys(self._key, max(prompts) + 1)[jnp.asarray([*prompts, *[0] * missing])]
        state = prefill(self._decoding_params, tokens, lengths, keys)
        most = state.generation.tokens.shape[1]
        while True:
            # copies: the state is donated to the next step
            out, step = jax.tree.map(np.array, (state.generation, state.step))
            said = [
                self.tokenizer.decode(row[:length], skip_control=True)
                for row, length in zip(out.tokens, out.lengths, strict=True)
            ][: len(prompts)]
            rows = zip(prompts, said, out.finished[: len(said)], strict=True)
            if step >= most or all(finished or ended(i, text) for i, text, finished in rows):
                return said
            state = advance(self._decoding_params, state, CHUNK_TOKENS)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return indices in batches of like length, the longest first: what fits then fits all."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


def _score(model: Transformer, tile_tokens: int, params, tokens, targets, counts):
    """Return log-probabilities [B, T] of targets and whether each is the likeliest token."""
    index = jnp.arange(tokens.shape[1])[None]
    hidden, _ = model.apply(
        {"params": params},
        tokens,
        segment_ids=(index < counts[:, None]).astype(jnp.int32),
        positions=jnp.broadcast_to(index, tokens.shape),
        method="hidden",
    )
    head = head_params(model.config, params)

    def tile(hidden, targets):
        logits = model.apply({"params": head}, hidden, method="unembed").astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        return log_probs, jnp.argmax(logits, axis=-1) == targets

    return map_tiles(tile, tile_tokens, (hidden, targets))


def _right_padded(rows: Sequence[Sequence[int]], length: int, count: int):
    """Return tokens and targets [count, length], and how many of each row are real."""
    tokens, targets = np.zeros((2, count, length), np.int32)
    counts = np.ones(count, np.int32)
    for i, row in enumerate(rows):
        n = counts[i] = len(row) - 1
        tokens[i, :n], targets[i, :n] = row[:-1], row[1:]
    return tokens, targets, counts
