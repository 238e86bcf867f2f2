"""Attention kernels, chosen by name and each tested against the dense one. Models floor."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llm.models.config import KEPT
from llm.models.masks import AttentionPattern
from llm.models.platforms import need_platform, platform

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B K S H"]

BLOCK_TOKENS = 64  # queries a block of the "blocked" kernel; measured on CPU at T = 256 … 1,024


def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    pattern: AttentionPattern,
    *,
    kernel: str,
    softcap: float | None = None,
) -> Queries:
    """Return softmax(q·k / sqrt(H) + bias) · v under the pattern's mask, by the kernel named.

    A query that may see nothing (padding) gets an arbitrary finite value.

    Raises:
      ValueError: the kernel cannot do what the pattern or the soft-cap asks.
    """
    if kernel == "auto":
        kernel = _choose(q, k, pattern, softcap)
    match kernel:
        case "xla":
            return checkpoint_name(_attend_dense(q, k, v, pattern, softcap), KEPT)
        case "blocked":
            return checkpoint_name(_attend_blocked(q, k, v, pattern, softcap), KEPT)
        case "cudnn":
            return checkpoint_name(_attend_cudnn(q, k, v, pattern, softcap), KEPT)
        case "splash":
            from llm.models.splash import attend_splash  # Pallas's TPU modules load on demand

            return attend_splash(q, k, v, pattern, softcap)
    raise ValueError(f"attention_kernel={kernel!r}: must be auto, xla, blocked, cudnn or splash")


def _choose(q: Queries, k: Keys, pattern: AttentionPattern, softcap: float | None) -> str:
    """Return the fastest kernel that can do this on the platform compiled for."""
    training = q.shape[1] == k.shape[2] and pattern.query_start is None
    backend = platform()
    if not training:
        return "xla"
    if (
        backend == "gpu"
        and q.dtype != jnp.float32
        and softcap is None
        and pattern.alibi_heads is None
    ):
        return "cudnn"
    if backend == "tpu" and q.shape[1] % 128 == 0 and pattern.kind == "causal":
        return "splash" if pattern.alibi_heads is None else "xla"
    return "blocked" if backend == "cpu" else "xla"


def _weights(logits, pattern: AttentionPattern, softcap, queries: slice, keys: slice):
    """Return the softmax of logits [B K G T S] in float32 (or wider) under mask and bias."""
    logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))  # bf16 loses small weights
    if softcap is not None:
        logits = jnp.tanh(logits / softcap) * softcap
    _, num_kv, groups, t, s = logits.shape
    bias = pattern.bias(queries, keys)
    if bias is not None:
        logits = logits + bias.reshape(num_kv, groups, t, s)
    mask = pattern.mask(queries, keys)
    if mask is not None:
        # finite, so that a row that sees nothing stays free of NaN
        logits = jnp.where(mask[:, None, None], logits, -1e30)
    return jax.nn.softmax(logits, axis=-1)


def _attend_slice(q, k, v, pattern, softcap, queries: slice, keys: slice):
    """Attend from the queries [B K G t H] of one slice to the keys and values of another."""
    k, v = k[:, :, keys], v[:, :, keys]
    b, num_kv, groups, t, h = q.shape
    # one product of (G·t, H) by (H, S) a key-value head: the form that CPU libraries run best
    flat = q.reshape(b, num_kv, groups * t, h)
    logits = jnp.einsum("BKXH,BKSH->BKXS", flat, k).reshape(b, num_kv, groups, t, -1)
    weights = _weights(logits, pattern, softcap, queries, keys).astype(v.dtype)
    out = jnp.einsum("BKXS,BKSH->BKXH", weights.reshape(b, num_kv, groups * t, -1), v)
    return out.reshape(b, num_kv, groups, t, h)


def _split_heads(q: Queries, num_kv: int) -> Float[Array, "B K G T H"]:
    """Return scaled queries, grouped by the key-value head that they share."""
    b, t, n, h = q.shape
    q = (q * jnp.asarray(h**-0.5, q.dtype)).reshape(b, t, num_kv, n // num_kv, h)
    return q.transpose(0, 2, 3, 1, 4)


def _join_heads(out: Float[Array, "B K G T H"]) -> Queries:
    b, num_kv, groups, t, h = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, num_kv * groups, h)


def _attend_dense(q, k, v, pattern, softcap):
    everything = slice(0, q.shape[1]), slice(0, k.shape[2])
    return _join_heads(
        _attend_slice(_split_heads(q, k.shape[1]), k, v, pattern, softcap, *everything)
    )


def _attend_blocked(q, k, v, pattern, softcap):
    """Dense attention, a block of queries at a time, without the keys that none of it can see."""
    t, s = q.shape[1], k.shape[2]
    if t != s or pattern.query_start is not None:
        return _attend_dense(q, k, v, pattern, softcap)
    grouped, blocks = _split_heads(q, k.shape[1]), []
    for start in range(0, t, BLOCK_TOKENS):
        queries = slice(start, min(start + BLOCK_TOKENS, t))
        first = 0 if pattern.window is None else max(0, start - pattern.window + 1)
        last = s
        if pattern.kind == "causal":
            last = queries.stop
        elif pattern.window is not None:
            last = min(s, queries.stop + pattern.window - 1)
        if pattern.kind == "prefix" and pattern.window is None:
            first, last = 0, s
        blocks.append(
            _attend_slice(
                grouped[:, :, :, queries], k, v, pattern, softcap, queries, slice(first, last)
            )
        )
    return _join_heads(jnp.concatenate(blocks, axis=3))


def _attend_cudnn(q, k, v, pattern, softcap):
    """cuDNN's fused attention; packed segments and prefixes go in as an explicit mask."""
    if softcap is not None or pattern.alibi_heads is not None:
        raise ValueError(
            "attention_kernel='cudnn' has no soft-cap and no ALiBi; use 'xla' or 'auto'"
        )
    need_platform("cudnn", "gpu")
    everything = slice(0, q.shape[1]), slice(0, k.shape[2])
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    plain = pattern.kind == "causal" and pattern.window is None and pattern.query_segments is None
    if plain and pattern.query_start is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    mask = pattern.mask(*everything)
    if mask is not None:
        # cuDNN takes the batch and head dimensions of a mask as given: it does not broadcast them
        mask = jnp.broadcast_to(mask[:, None], (q.shape[0], 1, *mask.shape[1:]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
