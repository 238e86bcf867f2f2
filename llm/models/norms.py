"""LayerNorm and RMSNorm, statistics in float32. Models floor."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class Norm(nn.Module):
    """Normalise the last axis; LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""

    kind: Literal["layernorm", "rmsnorm"]
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        compute = jnp.promote_types(jnp.float32, self.dtype)
        x = x.astype(compute)  # a bf16 variance loses the small differences that it sums
        width = (x.shape[-1],)
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
            width,
            compute,
        )
        if self.kind == "rmsnorm":
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
            return (x * scale).astype(self.dtype)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)),
            width,
            compute,
        )
        return (x * scale + bias).astype(self.dtype)
