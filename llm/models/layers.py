"""Attention, feed-forward and the residual block that joins them. Models floor."""

import functools
from typing import Literal, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llm.models.attention_kernels import attend
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.context import whole_rows
from llm.models.masks import AttentionPattern
from llm.models.norms import Norm
from llm.models.positions import apply_rotary
from llm.models.projection import Projection, fan_in
from llm.parallel.rules import constrain

Hidden = Float[Array, "B T D"]


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class LayerInputs:
    """What every layer of one forward pass shares."""

    patterns: dict[str, AttentionPattern]  # by layer kind
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
    kind: Literal["global", "local"]

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
        pattern = inputs.patterns[self.kind]
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
        out = checkpoint_name(constrain(out, *query_axes), "attention")
        spec, axes = "BTNH,NHD->BTD", ("heads", "head_dim", "embed")
        out = project("out", spec, (n, h, d), axes, c.attention_bias == "all", residual=True)(out)
        return out, cache


class FeedForward(nn.Module):
    """Two matrices around a non-linearity, or three with a gate (Shazeer 2020, 2002.05202)."""

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        d, f = c.width, c.mlp_width

        def project(name, spec, shape, axes, residual=False):
            init = kernel_init(c, spec, shape, residual)
            return Projection(
                spec, shape, axes, init, c.mlp_bias, dtype, adapter=self.adapter, name=name
            )

        up = project("up", "BTD,DF->BTF", (d, f), ("embed", "mlp"))(x)
        match c.activation:
            case "gelu":
                hidden = jax.nn.gelu(up, approximate=False)
            case "gelu_tanh":
                hidden = jax.nn.gelu(up, approximate=True)
            case "relu":
                hidden = jax.nn.relu(up)
            case "relu_squared":
                hidden = jnp.square(jax.nn.relu(up))
            case "swiglu":
                hidden = (
                    jax.nn.silu(project("gate", "BTD,DF->BTF", (d, f), ("embed", "mlp"))(x)) * up
                )
            case "geglu":
                gate = project("gate", "BTD,DF->BTF", (d, f), ("embed", "mlp"))(x)
                hidden = jax.nn.gelu(gate, approximate=True) * up
        hidden = constrain(hidden, "activation_batch", "activation_length", "activation_mlp")
        return project("down", "BTF,FD->BTD", (f, d), ("mlp", "embed"), residual=True)(hidden)


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual around it and a norm before or after."""

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig
    kind: Literal["global", "local"]

    @nn.compact
    def __call__(
        self, x: Hidden, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        attention_norm = Norm(c.norm, c.norm_epsilon, dtype, name="attention_norm")
        attention = Attention(c, self.compute, self.adapter, self.kind, name="attention")
        mlp_norm = Norm(c.norm, c.norm_epsilon, dtype, name="mlp_norm")
        mlp = FeedForward(c, self.compute, self.adapter, name="mlp")

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


def kernel_init(config: TransformerConfig, spec: str, shape: tuple[int, ...], residual: bool):
    """Return the initialiser of a kernel; `residual` marks those that write to the residual stream.

    Source: "gpt2" is Radford et al. 2019, section 2.3; "fan_in" with zero residual outputs is the
    modded-nanogpt and nanochat practice.
    """
    if config.initializer == "gpt2":
        std = 0.02 / (config.width_ratio or 1.0) ** 0.5
        return nn.initializers.normal(std / (2 * config.num_layers) ** 0.5 if residual else std)
    if residual:
        return nn.initializers.zeros_init()
    return nn.initializers.normal(fan_in(spec, shape) ** -0.5)
