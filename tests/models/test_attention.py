"""Attention kernels and masks: literals by hand, and every kernel against naive NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models import attention_kernels
from llm.models.attention_kernels import attend
from llm.models.masks import AttentionPattern
from llm.models.positions import alibi_slopes


def whole(pattern, t, s):
    mask = pattern.mask(slice(0, t), slice(0, s))
    return np.broadcast_to(np.asarray(mask), (1, t, s))[0].astype(int).tolist()


def test_causal_mask():
    assert whole(AttentionPattern("causal"), 3, 3) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_causal_window_sees_itself_and_the_window_less_one_before():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert whole(AttentionPattern("causal", window=2), 4, 4) == expected


def test_prefix_mask_shows_the_prefix_to_all():
    pattern = AttentionPattern("prefix", prefix=jnp.array([[True, True, False, False]]))
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert whole(pattern, 4, 4) == expected


def test_packed_documents_do_not_see_each_other_nor_padding():
    segments = jnp.array([[1, 1, 2, 0]])
    pattern = AttentionPattern("causal", query_segments=segments, key_segments=segments)
    assert whole(pattern, 4, 4) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_cached_queries_start_where_the_cache_ends():
    assert whole(AttentionPattern("causal", query_start=2), 2, 4) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_alibi_slopes():
    """Press et al. 2021: 8 heads halve from 1/2; 12 heads take 8 and every other one of 16."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(
        alibi_slopes(12)[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rtol=1e-6
    )


def naive(q, k, v, kind, window, segments, prefix, slopes, softcap):
    """Attention in float64, one query, head and sequence at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    # looked up one by one, which in a JAX array is a program each
    segments, prefix, slopes = (
        x if x is None else np.asarray(x) for x in (segments, prefix, slopes)
    )
    batch, length, heads, width = q.shape
    groups = heads // k.shape[1]
    out = np.zeros_like(q)
    for b, t, n in itertools.product(range(batch), range(length), range(heads)):
        logits = np.full(length, -np.inf)
        for s in range(length):
            seen = kind == "bidirectional" or s <= t or (kind == "prefix" and prefix[b, s])
            if window is not None:
                seen = seen and abs(t - s) < window
            if segments is not None:
                seen = seen and segments[b, s] == segments[b, t] and segments[b, s] > 0
            if seen:
                logit = q[b, t, n] @ k[b, n // groups, s] / width**0.5
                if softcap:
                    logit = softcap * np.tanh(logit / softcap)
                logits[s] = logit - (slopes[n] * abs(t - s) if slopes is not None else 0)
        if np.isfinite(logits).any():
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights / weights.sum() @ v[b, n // groups]
    return out


CASES = {
    "causal": dict(),
    "grouped": dict(kv=2),
    "multi-query": dict(kv=1),
    "packed": dict(packed=True),
    "packed window": dict(packed=True, window=9, kv=2),
    "bidirectional": dict(kind="bidirectional", packed=True),
    "bidirectional window": dict(kind="bidirectional", window=7),
    "prefix": dict(kind="prefix", packed=True),
    "prefix window": dict(kind="prefix", window=11),
    "alibi": dict(alibi=True, packed=True),
    "softcap": dict(softcap=1.5),
}


@pytest.mark.parametrize("kernel", ["xla", "blocked"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_against_naive(kernel, case, monkeypatch):
    monkeypatch.setattr(attention_kernels, "BLOCK_TOKENS", 8)  # several blocks, one of them ragged
    options = dict(kind="causal", kv=4, window=None, packed=False, alibi=False, softcap=None)
    options |= CASES[case]
    batch, length, heads, width = 2, 29, 4, 8
    keys = jax.random.split(jax.random.key(0), 3)
    q = 2 * jax.random.normal(keys[0], (batch, length, heads, width))
    k = jax.random.normal(keys[1], (batch, options["kv"], length, width))
    v = jax.random.normal(keys[2], (batch, options["kv"], length, width))
    segments = jnp.array([[1] * 10 + [2] * 12 + [0] * 7, [1] * 29]) if options["packed"] else None
    prefix = jnp.arange(length)[None] % 10 < jnp.array([[4], [6]])
    slopes = jnp.asarray(alibi_slopes(heads)) if options["alibi"] else None
    pattern = AttentionPattern(
        options["kind"],
        options["window"],
        query_segments=segments,
        key_segments=segments,
        prefix=prefix if options["kind"] == "prefix" else None,
        alibi_heads=heads if options["alibi"] else None,
    )
    run = functools.partial(attend, pattern=pattern, kernel=kernel, softcap=options["softcap"])
    out = jax.jit(run)(q, k, v)
    expected = naive(
        q, k, v, options["kind"], options["window"], segments, prefix, slopes, options["softcap"]
    )
    real = np.ones((batch, length), bool) if segments is None else np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=2e-6)
    assert np.isfinite(np.asarray(out)).all()


def test_unknown_kernel_is_named():
    q = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match="'flash'.*blocked"):
        attend(
            q,
            q.transpose(0, 2, 1, 3),
            q.transpose(0, 2, 1, 3),
            AttentionPattern("causal"),
            kernel="flash",
        )
