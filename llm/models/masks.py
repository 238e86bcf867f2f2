"""Who may attend to whom: one description, read by every attention kernel. Models floor."""

from typing import Literal, no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm.models.positions import alibi_slopes


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class AttentionPattern:
    """The rule by which query row t (at index `query_start` + t among the keys) sees key s.

    Queries that are the keys' own rows have None there, which unlike a 0 is still known where
    nn.remat has made every array abstract: the fast kernels are for them.

    Distances are differences of indices, so that packed documents, which stand side by side in a
    row, need no positions here; segments keep them apart, and segment 0 is padding.
    """

    kind: Literal["causal", "bidirectional", "prefix"] = flax.struct.field(pytree_node=False)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    query_start: Int[Array, ""] | int | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    prefix: Bool[Array, "B S"] | None = None  # keys that every query of their document may see
    alibi_heads: int | None = flax.struct.field(pytree_node=False, default=None)  # N, with ALiBi

    def distance(self, queries: slice, keys: slice) -> Int[Array, "T S"]:
        """Return how many tokens before the query each key stands, negative for later keys."""
        q = jnp.arange(queries.start, queries.stop)[:, None]
        if self.query_start is not None:
            q = q + self.query_start
        return q - jnp.arange(keys.start, keys.stop)[None, :]

    def mask(self, queries: slice, keys: slice) -> Bool[Array, "#B T S"] | None:
        """Return True where a query of the slice may see a key of the slice; None: everywhere."""
        distance = self.distance(queries, keys)
        mask = None
        if self.kind != "bidirectional":
            mask = (distance >= 0)[None]
            if self.kind == "prefix" and self.prefix is not None:
                mask = mask | self.prefix[:, None, keys]
        if self.window is not None:
            near = (jnp.abs(distance) < self.window)[None]
            mask = near if mask is None else mask & near
        if self.query_segments is not None:
            q, k = self.query_segments[:, queries, None], self.key_segments[:, None, keys]
            same = (q == k) & (k > 0)
            mask = same if mask is None else mask & same
        return mask

    def bias(self, queries: slice, keys: slice) -> Float[Array, "N T S"] | None:
        """Return what each head adds to its logits: −slope · distance for ALiBi, else None."""
        if self.alibi_heads is None:
            return None
        slopes = jnp.asarray(alibi_slopes(self.alibi_heads))
        return -slopes[:, None, None] * jnp.abs(self.distance(queries, keys))[None]
