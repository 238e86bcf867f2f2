"""The feed-forward block, its non-linearities, and how kernels begin. Models floor."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.projection import Projection, fan_in
from llm.parallel.rules import constrain

Hidden = Float[Array, "B T D"]


class FeedForward(nn.Module):
    """Two matrices around a non-linearity, or three with a gate (Shazeer 2020, 2002.05202)."""

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig
    mlp_width: int

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        d, f = c.width, self.mlp_width

        def project(name, spec, shape, axes, residual=False):
            init = kernel_init(c, spec, shape, residual)
            return Projection(
                spec, shape, axes, init, c.mlp_bias, dtype, adapter=self.adapter, name=name
            )

        into = ("BTD,DF->BTF", (d, f), ("embed", "mlp"))
        up = project("up", *into)(x)
        gate = project("gate", *into)(x) if c.gated else None
        hidden = activate(c.activation, up, gate)
        hidden = constrain(hidden, "activation_batch", "activation_length", "activation_mlp")
        return project("down", "BTF,FD->BTD", (f, d), ("mlp", "embed"), residual=True)(hidden)


def activate(
    activation: str, up: Float[Array, "... F"], gate: Float[Array, "... F"] | None
) -> Float[Array, "... F"]:
    """Return what comes between the block's matrices; the gated ones take a gate."""
    match activation:
        case "gelu":
            return jax.nn.gelu(up, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(up, approximate=True)
        case "relu":
            return jax.nn.relu(up)
        case "relu_squared":
            return jnp.square(jax.nn.relu(up))
        case "swiglu":
            return jax.nn.silu(gate) * up
        case "geglu":
            return jax.nn.gelu(gate, approximate=True) * up
    raise ValueError(f"no activation is named {activation!r}")


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


def readout_init(config: TransformerConfig):
    """Return the initialiser of a kernel to a number of outputs that does not grow with the width:
    the head's, and a router's. Under muP it is the base's."""
    base_width = config.mup_base_width or config.width
    return nn.initializers.normal(0.02 if config.initializer == "gpt2" else base_width**-0.5)
