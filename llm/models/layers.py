"""Attention, feed-forward and the residual block that joins them. Models floor."""

import functools
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm.models.attention_kernels import attend
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.context import whole_rows
from llm.models.feed_forward import FeedForward, Hidden, kernel_init
from llm.models.masks import AttentionPattern
from llm.models.moe import MixtureOfExperts
from llm.models.norms import Norm
from llm.models.positions import apply_rotary
from llm.models.projection import Projection
from llm.parallel.rules import constrain


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class LayerInputs:
    """What every layer of one forward pass shares."""

    patterns: dict[str, AttentionPattern]  # by layer kind, whatever the feed-forward block
    real: Bool[Array, "B T"] | None  # tokens that are no padding; None: all
    rotary: tuple[jax.Array, jax.Array] | None  # cos and sin
    deterministic: bool = flax.struct.field(pytree_node=False)


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class LayerCache:
    """One layer's keys and values; layers at one place of the cycle are stacked on axis 0."""

    key: Float[Array, "*L B K S H"]
    value: Float[Array, "*L B K S H"]

    def write(self, start, key, value) -> "LayerCache":
        """Return the cache with [B K T H] keys and values written from `start` on."""
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
        return LayerCache(
            put(self.key, key.astype(self.key.dtype)),
            put(self.value, value.astype(self.value.dtype)),
        )


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention: one module, by the number of K heads."""

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig
    kind: str

    @nn.compact
    def __call__(
        self, x: Hidden, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        n, k, h, d = c.num_heads, c.num_kv_heads, c.head_dim, c.width

        def project(name, spec, shape, axes, bias, residual=False):
            init = kernel_init(c, spec, shape, residual)
            return Projection(spec, shape, axes, init, bias, dtype, adapter=self.adapter, name=name)

        bias = c.attention_bias != "none"
        query = project("query", "BTD,DNH->BTNH", (d, n, h), ("embed", "heads", "head_dim"), bias)(
            x
        )
        kv_axes = ("embed", "kv_heads", "head_dim")
        key = project("key", "BTD,DKH->BTKH", (d, k, h), kv_axes, bias)(x)
        value = project("value", "BTD,DKH->BTKH", (d, k, h), kv_axes, bias)(x)
        of_tokens = "activation_batch", "activation_length"
        query_axes = (*of_tokens, "activation_heads", "activation_head_dim")
        query = constrain(query, *query_axes)
        if c.qk_norm:
            query = Norm("rmsnorm", c.norm_epsilon, dtype, name="query_norm")(query)
            key = Norm("rmsnorm", c.norm_epsilon, dtype, name="key_norm")(key)
        if inputs.rotary is not None:
            query, key = apply_rotary(query, *inputs.rotary), apply_rotary(key, *inputs.rotary)
        if c.mup_base_head_dim is not None:  # 1/H in all, as far as it is not the base's
            query = query * jnp.asarray((c.mup_base_head_dim / h) ** 0.5, query.dtype)
        if self.is_mutable_collection("probes"):
            self.sow("probes", "seen_query", query)
            self.sow("probes", "seen_key", key)
        pattern = inputs.patterns[self.kind.removesuffix("_moe")]
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        if cache is not None:
            start = pattern.query_start
            cache = cache.write(0 if start is None else start, key, value)
            if start is not None:  # else empty before: these keys are all
                key, value = cache.key, cache.value
        out = attend(
            *whole_rows(query, key, value),
            pattern,
            kernel=self.compute.attention_kernel,
            softcap=c.attention_softcap,
        )
        out = constrain(out, *query_axes)
        spec, axes = "BTNH,NHD->BTD", ("heads", "head_dim", "embed")
        out = project("out", spec, (n, h, d), axes, c.attention_bias == "all", residual=True)(out)
        return out, cache


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual around it and a norm before or after.

    `kind` is one of config.LAYER_KINDS.
    """

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig
    kind: str

    @nn.compact
    def __call__(
        self, x: Hidden, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        attention_norm = Norm(c.norm, c.norm_epsilon, dtype, name="attention_norm")
        attention = Attention(c, self.compute, self.adapter, self.kind, name="attention")
        mlp_norm = Norm(c.norm, c.norm_epsilon, dtype, name="mlp_norm")
        if self.kind.endswith("_moe"):
            experts = MixtureOfExperts(c, self.compute, self.adapter, name="mlp")
            mlp = functools.partial(experts, real=inputs.real, cached=cache is not None)
        else:
            mlp = FeedForward(c, self.compute, self.adapter, c.mlp_width, name="mlp")

        def dropout(y):
            return nn.Dropout(c.dropout_rate)(y, deterministic=inputs.deterministic)

        if c.norm_placement == "pre":
            y, cache = attention(attention_norm(x), inputs, cache)
            x = x + dropout(y)
            if c.activation != "none":
                x = x + dropout(mlp(mlp_norm(x)))
        else:
            y, cache = attention(x, inputs, cache)
            x = attention_norm(x + dropout(y))
            if c.activation != "none":
                x = mlp_norm(x + dropout(mlp(x)))
        return constrain(x, "activation_batch", "activation_length", "activation_embed"), cache
