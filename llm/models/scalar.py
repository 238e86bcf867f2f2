"""A transformer that gives a number at each position: reward models and value functions.
Models floor."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.projection import Projection
from llm.models.transformer import Tokens, Transformer


class ScalarModel(nn.Module):
    """A language model's trunk under a scalar head. Its parameters: `trunk`, without the language
    model's own head, and `score`, which begins at zero."""

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()
    adapter: AdapterConfig = AdapterConfig()

    def setup(self):
        self.trunk = Transformer(self.config, self.compute, self.adapter)
        self.score = Projection(
            "BTD,DZ->BTZ",
            (self.config.width, 1),
            ("embed", None),
            nn.initializers.zeros_init(),
            use_bias=True,
            dtype=jnp.dtype(self.compute.dtype),
            float32_output=True,
        )

    def __call__(self, tokens: Tokens, **kwargs) -> Float[Array, "B T"]:
        """Return the float32 number at each position; arguments as `Transformer.hidden`'s."""
        hidden, _ = self.trunk.hidden(tokens, **kwargs)
        return self.score(hidden)[..., 0]


def at_last_token(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """Return each row's number at its last token that is not padding (segment 0).

    The same for rows padded on the left and on the right; 0 for a row of padding alone.
    """
    length = values.shape[1]
    last = jnp.max(jnp.where(segment_ids > 0, jnp.arange(length), -1), axis=1)
    # compared rather than gathered: a length split over devices stays where it is
    return jnp.sum(jnp.where(jnp.arange(length) == last[:, None], values, 0.0), axis=1)
