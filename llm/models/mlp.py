"""A network of one hidden layer for multitask sparse parity. Models floor."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from llm.models.projection import Projection


class ParityNetwork(nn.Module):
    """Linear, ReLU, linear: from which subtask (one-hot) and which bits to the parity's logits.

    Source: Michaud et al. 2023, arXiv:2303.13506, section 3.
    """

    num_subtasks: int
    num_bits: int
    width: int

    @nn.compact
    def __call__(self, subtask: Int[Array, " B"], bits: Float[Array, "B N"]) -> Float[Array, "B 2"]:
        one_hot = jax.nn.one_hot(subtask, self.num_subtasks, dtype=bits.dtype)
        x = jax.numpy.concatenate([one_hot, bits], axis=-1)
        hidden = self._linear("hidden", "BI,IF->BF", x.shape[-1], self.width)(x)
        return self._linear("out", "BF,FV->BV", self.width, 2)(jax.nn.relu(hidden))

    def _linear(self, name: str, spec: str, inputs: int, outputs: int) -> Projection:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's own
        axes = (None, "mlp") if name == "hidden" else ("mlp", None)
        return Projection(spec, (inputs, outputs), axes, init, use_bias=True, name=name)
