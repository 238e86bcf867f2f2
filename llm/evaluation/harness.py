"""A model of ours as one of lm-evaluation-harness's, whose tasks it then answers. Third floor.

Needs the extra `[harness]`; nothing else imports this file. Texts become tokens as the harness's
own `hf` model has them, so that both give the same scores for the same weights.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llm.data.chat import ChatError
from llm.data.tokenizers import Tokenizer
from llm.generation.config import SamplingConfig
from llm.generation.decode import make_decoder
from llm.generation.generator import stop_ids
from llm.generation.prompts import bucket_length, pad_prompts, sequence_keys
from llm.models.transformer import Transformer, head_params
from llm.models.unstack import unstack, unstacked
from llm.objectives.cross_entropy import cut_tiles, join_tiles, num_tiles

DEFAULT_NEW_TOKENS = 256  # what `hf` generates at most where the task does not say
CHUNK_TOKENS = 16  # generated between two looks for stop strings
# generation arguments of a task → fields of SamplingConfig
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # key, context, continuation


class HarnessModel(TemplateLM):
    """What `lm_eval.simple_evaluate(model=…)` asks: likelihoods and texts.

    `max_length` is the window in tokens: longer contexts lose their beginning, longer texts are
    scored window by window. Draws depend on `seed` and the request's place in its task alone.
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
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_length = max_length or model.config.max_length_tokens
        self._model, self._mesh, self._key = model, mesh, jax.random.key(seed)
        with jax.set_mesh(mesh):
            self._params = jax.device_put(params)
        self._score = jax.jit(functools.partial(_score, model, tile_tokens))

    @functools.cached_property
    def _decoding_params(self) -> dict:
        """The layers one by one, as decoding wants them: made for the first task that generates."""
        return jax.jit(functools.partial(unstack, self._model))(self._params)

    # --- Tokens -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of rendered requests."""
        return f"ontogeny-{self.tokenizer.digest[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return a text's tokens, those before it that the model expects included.

        Spelled control tokens become tokens, as a rendered chat needs it.
        """
        prefix, bos = self.tokenizer.text_prefix, self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is False or (add_special_tokens is None and string.startswith(bos)):
            prefix = ()
        return [*prefix, *self.tokenizer.encode(string, control=True)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, its last message left open without a generation prompt.

        A template that knows no system role gets the messages without theirs, as under `hf`.
        """
        try:
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt)
        except ChatError:
            chat_history = [m for m in chat_history if m["role"] != "system"]
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())  # templates may trim what was said
        whole = text.startswith(last.lstrip(), start)
        return text[: start + len(last.lstrip() if whole else last.strip())]

    # --- Likelihoods --------------------------------------------------------------------------

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, in nats, all of it scored once."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (nats, _) in zip(owners, scores, strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) and whether each of its tokens was the likeliest."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = []
        for text, context, continuation in requests:
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"{text}: {len(context)} tokens of context and {len(continuation)} to score: "
                    f"needs at least one each, and at most {self.max_length} to score"
                )
            rows.append((context + continuation)[-(self.max_length + 1) :])
        batches = self._batches([len(row) - 1 for row in rows])
        with self._at_work(len(requests), "Scoring", disable_tqdm) as progress:
            for chosen in batches:
                length = bucket_length(max(len(rows[i]) - 1 for i in chosen))
                tokens, targets, counts = _right_padded(
                    [rows[i] for i in chosen], length, self.batch_size
                )
                log_probs, greedy = jax.device_get(
                    self._score(self._params, tokens, targets, counts)
                )
                for row, i in enumerate(chosen):
                    scored = slice(counts[row] - len(requests[i][2]), counts[row])
                    nats = float(log_probs[row, scored].astype(np.float64).sum())
                    answers[i] = (nats, bool(greedy[row, scored].all()))
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                progress.update(len(chosen))
        return answers

    # --- Texts --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first of its stop strings or EOS."""
        texts = [""] * len(requests)
        plans = [self._plan(request.args[1]) for request in requests]
        with self._at_work(len(requests), "Generating", disable_tqdm) as progress:
            for sampling, stops in dict.fromkeys(plans):
                mine = [i for i, plan in enumerate(plans) if plan == (sampling, stops)]
                room = self.max_length - sampling.max_new_tokens
                prompts = {i: self._prompt(requests[i].args[0])[-room:] for i in mine}
                decoder = self._decoder(sampling)
                for batch in self._batches([len(prompts[i]) for i in mine]):
                    chosen = [mine[i] for i in batch]
                    done = self._generate(decoder, {i: prompts[i] for i in chosen}, stops)
                    for i, text in zip(chosen, done, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    progress.update(len(chosen))
        return texts

    def _plan(self, given: dict[str, Any]) -> tuple[SamplingConfig, tuple[str, ...]]:
        """Return how a task wants its texts generated, and where they stop."""
        wanted = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        eos = self.tokenizer.decode([self.eot_token_id])
        stops = handle_stop_sequences(wanted.pop("until"), eos)
        limit = wanted.pop("max_gen_toks")
        if not wanted.pop("do_sample"):
            wanted["temperature"] = 0.0
        if unknown := sorted(set(wanted) - _SAMPLING):
            raise ValueError(
                f"generation arguments {', '.join(unknown)}: unknown here; "
                f"known are until, max_gen_toks, do_sample, {', '.join(sorted(_SAMPLING))}"
            )
        if limit >= self.max_length:
            raise ValueError(
                f"max_gen_toks={limit} leaves no room for a prompt in the model's "
                f"{self.max_length} tokens; set gen_kwargs' max_gen_toks, or max_length"
            )
        return SamplingConfig(max_new_tokens=limit, **wanted), tuple(stop for stop in stops if stop)

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _decoder(self, sampling: SamplingConfig):
        ends, pad_id = stop_ids(self.tokenizer), self.eot_token_id
        prefill, advance = make_decoder(
            unstacked(self._model), sampling, eos_ids=ends, pad_id=pad_id
        )
        return jax.jit(prefill), jax.jit(advance, donate_argnums=1)

    def _generate(self, decoder, prompts: dict[int, list[int]], stops: Sequence[str]) -> list[str]:
        """Return the texts of one batch, generated no further than the stop strings need."""
        prefill, advance = decoder
        missing = self.batch_size - len(prompts)  # one shape, however few are left
        pad_id = self.eot_token_id
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
            ended = [
                finished or any(stop in text for stop in stops)
                for text, finished in zip(said, out.finished, strict=False)
            ]
            if all(ended) or step >= most:
                return [postprocess_generated_text(text, list(stops), None) for text in said]
            state = advance(self._decoding_params, state, CHUNK_TOKENS)

    # --- Batches ------------------------------------------------------------------------------

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return indices in batches of like length, the longest first: what fits then fits all."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    @contextlib.contextmanager
    def _at_work(self, count: int, what: str, quiet: bool) -> Iterator[tqdm]:
        with jax.set_mesh(self._mesh), tqdm(total=count, desc=what, disable=quiet) as progress:
            yield progress


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

    def tile(_, xs):
        hidden, targets = xs
        logits = model.apply({"params": head}, hidden, method="unembed").astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        return None, (log_probs, jnp.argmax(logits, axis=-1) == targets)

    tiles = num_tiles(*tokens.shape, tile_tokens)
    _, out = jax.lax.scan(tile, None, tuple(cut_tiles(x, tiles) for x in (hidden, targets)))
    return tuple(join_tiles(x) for x in out)


def _right_padded(rows: Sequence[Sequence[int]], length: int, count: int):
    """Return tokens and targets [count, length], and how many of each row are real."""
    tokens, targets = np.zeros((2, count, length), np.int32)
    counts = np.ones(count, np.int32)
    for i, row in enumerate(rows):
        n = counts[i] = len(row) - 1
        tokens[i, :n], targets[i, :n] = row[:-1], row[1:]
    return tokens, targets, counts
