"""A mixture of experts in place of a feed-forward block. Models floor.

Experts' kernels have the experts on their first axis. Which form computes them, with a capacity or
dropless, is the config's choice; where both keep every token they give the same.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm.models.capacity import capacity_of, with_capacity
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.dropless import dropless
from llm.models.feed_forward import FeedForward, Hidden, activate, kernel_init
from llm.models.projection import Projection, Weights, ragged_product
from llm.models.router import COLLECTION, Router, Routing, sum_routing
from llm.parallel.rules import constrain


class MixtureOfExperts(nn.Module):
    """Each token's weighted sum of its experts' outputs, and of an expert that all share.

    Leaves a `RouterSums` in the collection "router" where that is mutable. Padding (where `real` is
    False) goes to no expert.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1; shared experts, Dai et al. 2024,
    arXiv:2401.06066, eq. 9.
    """

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig

    @nn.compact
    def __call__(
        self, x: Hidden, *, real: Bool[Array, "B T"] | None, cached: bool = False
    ) -> Hidden:
        c = self.config
        routing = Router(c, jnp.dtype(self.compute.dtype), name="router")(x)
        experts = Experts(c, self.compute, self.adapter, name="experts")
        y, dropped = experts(x, routing, real, cached)
        if self.is_mutable_collection(COLLECTION):
            self.sow(COLLECTION, "sums", sum_routing(routing, real, dropped))
        if c.shared_expert_width:
            shared = FeedForward(
                c, self.compute, self.adapter, c.shared_expert_width, name="shared"
            )
            y = y + shared(x)
        return y


class Experts(nn.Module):
    """The experts' kernels, and the tokens' way through them and back."""

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig

    @nn.compact
    def __call__(
        self, x: Hidden, routing: Routing, real: Bool[Array, "B T"] | None, cached: bool
    ) -> tuple[Hidden, Float[Array, ""]]:
        """Return the weighted sum of the experts' outputs, and how many choices were dropped."""
        c = self.config
        project = self._projections()
        if c.expert_capacity_factor is not None:
            capacity = capacity_of(c, x.shape[1])
            return with_capacity(
                x, routing, real, functools.partial(self._in_buffers, project), capacity
            )
        y = dropless(
            x,
            routing,
            real,
            {name: projection.weights() for name, projection in project.items()},
            {name: projection.weight_axes() for name, projection in project.items()},
            self._in_rows,
            gathered=cached,
        )
        return y, jnp.zeros((), jnp.float32)

    def _projections(self) -> dict[str, Projection]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        e, d, f = c.num_experts, c.width, c.expert_mlp_width

        def project(name, spec, shape, axes, residual=False):
            init = kernel_init(c, spec, shape, residual)
            return Projection(
                spec, shape, ("experts", *axes), init, dtype=dtype, adapter=self.adapter, name=name
            )

        into = ("BECD,EDF->BECF", (e, d, f), ("embed", "expert_mlp"))
        out_of = ("BECF,EFD->BECD", (e, f, d), ("expert_mlp", "embed"))
        names = ("up", "gate") if c.gated else ("up",)
        return {name: project(name, *into) for name in names} | {
            "down": project("down", *out_of, residual=True)
        }

    def _in_buffers(
        self, project: dict[str, Projection], x: Float[Array, "B E C D"]
    ) -> Float[Array, "B E C D"]:
        up = project["up"](x)
        gate = project["gate"](x) if self.config.gated else None
        hidden = activate(self.config.activation, up, gate)
        axes = ("activation_expert_batch", "activation_experts", "activation_capacity")
        return project["down"](constrain(hidden, *axes, "activation_expert_mlp"))

    def _in_rows(
        self, weights: dict[str, Weights], rows: Float[Array, "M D"], group_sizes: jax.Array
    ) -> Float[Array, "M D"]:
        product = functools.partial(ragged_product, group_sizes=group_sizes, adapter=self.adapter)
        up = product(weights["up"], rows)
        gate = product(weights["gate"], rows) if self.config.gated else None
        return product(weights["down"], activate(self.config.activation, up, gate))
