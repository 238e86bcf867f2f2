"""Decoding with a cache gives what the whole sequence at once gives, for every kind of model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.transformer import init_cache
from llm.models.unstack import unstack, unstacked
from tests.generation.small_models import KINDS, VOCAB, build

LENGTHS = np.array([14, 9, 5], np.int32)
WIDTH, PROMPT = 14, 10


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_of_left_padded_rows_equal_the_full_forward(kind):
    model, params = build(kind)
    rows = np.random.default_rng(0).integers(1, VOCAB, (3, WIDTH)).astype(np.int32)
    # causal: what stands to the right of a row changes nothing, so one call does them all
    starts = WIDTH - LENGTHS
    shifted = np.stack([np.roll(row, -start) for row, start in zip(rows, starts, strict=True)])
    full = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, shifted)
    cached = _decode(unstacked(model), unstack(model, params), rows, starts)
    for one, want, start in zip(cached, full, starts, strict=True):
        np.testing.assert_allclose(
            one[start:, :VOCAB], want[: WIDTH - start, :VOCAB], atol=1e-5, rtol=1e-5
        )
        assert np.all(np.isneginf(one[:, VOCAB:]))


def _decode(model, params, rows, starts):
    """Return logits [B T V] of left-padded rows: PROMPT columns at once, then one by one."""
    index = np.arange(WIDTH)[None]
    segments = (index >= starts[:, None]).astype(np.int32)
    positions = np.maximum(index - starts[:, None], 0)

    def apply(cache, *columns):
        names = ("segment_ids", "positions")
        others = dict(zip(names, columns[1:], strict=True))
        return model.apply({"params": params}, columns[0], **others, cache=cache)

    start = jax.jit(lambda *columns: apply(init_cache(model.config, len(rows), WIDTH), *columns))
    step = jax.jit(apply)
    columns = lambda a, b: (jnp.asarray(x[:, a:b]) for x in (rows, segments, positions))  # noqa: E731
    logits, cache = start(*columns(0, PROMPT))
    out = [logits]
    for t in range(PROMPT, WIDTH):
        logits, cache = step(cache, *columns(t, t + 1))
        out.append(logits)
    return np.concatenate(out, axis=1)


def test_an_unstacked_model_rounds_its_parameters_as_the_model_would():
    """Norms keep float32 ones. Not jitted: compiled as one, XLA leaves roundings out."""
    model, params = build("prefix_and_cycle", dtype="bfloat16")
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, VOCAB)
    flat = unstack(model, params)
    assert flat["embedder"]["embedding"].dtype == jnp.bfloat16
    assert flat["prefix_1"]["mlp_norm"]["scale"].dtype == jnp.float32
    with jax.disable_jit():
        want = model.apply({"params": params}, tokens)
        np.testing.assert_array_equal(unstacked(model).apply({"params": flat}, tokens), want)


def test_unstacking_twice_changes_nothing():
    model, params = build("prefix_and_cycle")
    once = unstack(model, params)
    again = unstack(unstacked(model), once)
    assert unstacked(unstacked(model)) == unstacked(model)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, again, once)))
