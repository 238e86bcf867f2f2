"""Prefill and decode over a KV cache, each one jitted call. Generation floor.

Prompts are padded on the left, so that every sequence writes the same slot of the cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm.generation.config import SamplingConfig
from llm.generation.sampling import sample, uniform_pairs
from llm.models.transformer import Cache, Transformer, init_cache
from llm.models.unstack import unstack, unstacked


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class Generation:
    """What was generated: rows of M = max_new_tokens, of which the first `lengths` count."""

    tokens: Int[Array, "B M"]  # EOS included, then pad_id
    log_probs: Float[Array, "B M"]  # of those tokens under softmax(logits / temperature), then 0
    lengths: Int[Array, " B"]  # EOS included
    finished: Bool[Array, " B"]  # ended by EOS, not by the limit


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class DecodeState:
    """Everything that one more token depends on, besides the parameters."""

    cache: Cache
    token: Int[Array, " B"]  # sampled last; its keys and values are not in the cache yet
    position: Int[Array, " B"]  # of that token
    seen: Bool[Array, "B V"] | None  # tokens of prompt and reply, where there is a penalty on them
    uniform: Float[Array, "B M 2"]  # what each token of each sequence is drawn by
    step: Int[Array, ""]  # tokens sampled so far
    generation: Generation


def make_decoder(
    model: Transformer,
    sampling: SamplingConfig,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> tuple[Callable, Callable]:
    """Return (prefill, advance), to be jitted by the caller, for an `unstacked` model.

    prefill(params, prompts [B P], lengths [B], keys [B·n]) → DecodeState with one token sampled in
    each of n continuations of a prompt, side by side: what a prompt costs is paid once.
    advance(params, state, num_tokens) → DecodeState with up to num_tokens more, fewer when every
    sequence has ended or max_new_tokens are there.

    A prompt is the last `lengths` tokens of its row. Token t of a sequence is drawn by its key's
    t-th numbers from its own logits: it depends neither on its neighbours nor on padding.
    """
    eos = jnp.asarray(list(eos_ids), jnp.int32)

    def accept(state: DecodeState, logits: Float[Array, "B V"]) -> DecodeState:
        """Sample a token from the logits and write it down where the sequence goes on."""
        out, step = state.generation, state.step
        uniform = jax.lax.dynamic_index_in_dim(state.uniform, step, axis=1, keepdims=False)
        token, log_probs = sample(logits, uniform, sampling, state.seen)
        going_on = ~out.finished
        token = jnp.where(going_on, token, pad_id)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
        return state.replace(
            token=token,
            position=state.position + 1,
            seen=seen,
            step=step + 1,
            generation=Generation(
                put(out.tokens, token[:, None]),
                put(out.log_probs, jnp.where(going_on, log_probs, 0.0)[:, None]),
                out.lengths + going_on,
                out.finished | jnp.isin(token, eos) & going_on,
            ),
        )

    def prefill(params, prompts, lengths, keys) -> DecodeState:
        batch, width = prompts.shape
        padding = width - lengths[:, None]
        index = jnp.arange(width)[None]
        cache = init_cache(
            model.config, batch, width + sampling.max_new_tokens, model.compute.dtype
        )
        hidden, cache = model.apply(
            {"params": params},
            prompts,
            segment_ids=(index >= padding).astype(jnp.int32),
            positions=jnp.maximum(index - padding, 0),
            cache=cache,
            method="hidden",
        )
        logits = model.apply({"params": params}, hidden[:, -1:], method="unembed")[:, 0]
        seen = None
        if sampling.repetition_penalty != 1.0:
            rows = jnp.arange(batch)[:, None]
            seen = jnp.zeros(logits.shape, bool).at[rows, prompts].max(index >= padding)
        each = keys.shape[0] // batch
        if each > 1:
            several = (logits, seen, lengths, cache.layers, cache.segments)
            logits, seen, lengths, layers, segments = jax.tree.map(
                lambda x: jnp.repeat(x, each, axis=0), several
            )
            cache = cache.replace(layers=layers, segments=segments)
        batch = keys.shape[0]
        shape = (batch, sampling.max_new_tokens)
        nothing = Generation(
            jnp.full(shape, pad_id, jnp.int32),
            jnp.zeros(shape, logits.dtype),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch, bool),
        )
        uniform = uniform_pairs(keys, sampling.max_new_tokens)
        state = DecodeState(
            cache, jnp.zeros(batch, jnp.int32), lengths - 1, seen, uniform, jnp.int32(0), nothing
        )
        return accept(state, logits)

    def advance(params, state: DecodeState, num_tokens) -> DecodeState:
        last = jnp.minimum(state.step + num_tokens, sampling.max_new_tokens)

        def going_on(state):
            return (state.step < last) & ~jnp.all(state.generation.finished)

        def one_more(state):
            logits, cache = model.apply(
                {"params": params},
                state.token[:, None],
                positions=state.position[:, None],
                cache=state.cache,
            )
            return accept(state.replace(cache=cache), logits[:, 0])

        return jax.lax.while_loop(going_on, one_more, state)

    return prefill, advance


def make_generate(
    model: Transformer, sampling: SamplingConfig, *, eos_ids: Sequence[int] = (), pad_id: int = 0
) -> Callable[..., Generation]:
    """Return generate(params, prompts [B P], lengths [B], keys [B·n]) → Generation, jitted.

    A prompt is the last `lengths` tokens of its row (see `pad_prompts`), continued n times;
    parameters may be stacked or not. Compiles once for each (B, P, n).
    """

    prefill, advance = make_decoder(unstacked(model), sampling, eos_ids=eos_ids, pad_id=pad_id)

    @jax.jit
    def generate(params, prompts, lengths, keys) -> Generation:
        params = unstack(model, params)
        state = prefill(params, prompts, lengths, keys)
        return advance(params, state, sampling.max_new_tokens).generation

    return generate
