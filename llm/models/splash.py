"""Splash attention, the TPU's fused kernel, behind our pattern of masks. Models floor.

Imported only where it is asked for: Pallas's TPU modules are slow to load.
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llm.models.config import KEPT
from llm.models.masks import AttentionPattern
from llm.models.platforms import need_platform
from llm.parallel.rules import partition_spec

_LANES = 128  # lengths must be a multiple of a vector register's lanes
_BLOCK = 512


def attend_splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    pattern: AttentionPattern,
    softcap: float | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return attention by the splash kernel, shard by shard of the mesh in force.

    Outputs and their rows' sums are named for rematerialisation to keep: with both, the backward
    pass need not run the forward kernel again. `interpret` runs the kernel's program on any
    backend, slowly.

    Raises:
      ValueError: the kernel cannot do what the pattern asks, or the length does not fit it.
    """
    batch, length, heads, width = q.shape
    if pattern.alibi_heads is not None or pattern.kind == "prefix":
        raise ValueError("attention_kernel='splash' has no ALiBi and no prefixes; use 'xla'")
    if length != k.shape[2] or pattern.query_start is not None:
        raise ValueError("attention_kernel='splash' is for whole sequences; decode with 'auto'")
    if length % _LANES:
        raise ValueError(
            f"attention_kernel='splash' needs a length that {_LANES} divides, not {length}"
        )
    if not interpret:
        need_platform("splash", "tpu")
    segments = None
    if pattern.query_segments is not None:
        segments = splash.SegmentIds(pattern.query_segments, pattern.key_segments)

    def local(q, k, v, segments):
        kernel = _make_kernel(length, q.shape[1], pattern.kind, pattern.window, softcap, interpret)
        return jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(
            q, k, v, segments
        )

    q = (q * width**-0.5).astype(q.dtype).transpose(0, 2, 1, 3)
    if not jax.sharding.get_abstract_mesh().empty:
        # The compiler cannot split a kernel: each device runs it on its own sequences and heads.
        of_heads = partition_spec(("activation_batch", "activation_whole_row_heads", None, None))
        of_segments = PartitionSpec(of_heads[0], None)
        local = jax.shard_map(
            local,
            in_specs=(of_heads, of_heads, of_heads, of_segments),
            out_specs=of_heads,
            check_vma=False,
        )
    return local(q, k, v, segments).transpose(0, 2, 1, 3)


def _make_kernel(length, heads, kind, window, softcap, interpret):
    """Return the kernel of one sequence: its mask is compiled into which blocks are visited."""
    shape = (length, length)
    if kind == "causal":
        mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    else:
        mask = (
            splash.LocalMask(shape, (window - 1, window - 1), 0)
            if window
            else splash.FullMask(shape)
        )
    block = next(b for b in (_BLOCK, 256, _LANES) if length % b == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
