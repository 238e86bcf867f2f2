"""Bytes that a training step holds: parameters, gradients, optimizer, activations. Third floor.

Counted by tracing, so that any model, optimizer and rematerialisation is; nothing is allocated.
"""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, logical_axes, param_shapes
from llm.training.config import OptimizerConfig
from llm.training.optimizers import make_optimizer


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes by what they hold, of one replica that nothing shards."""

    params: int
    gradients: int
    optimizer: int
    activations: int  # kept from the forward for the backward pass, of one microbatch
    recomputed: int  # of one layer, again in the backward pass, under rematerialisation
    logits: int  # of a tile, and their gradient; gone when the layers' backward pass begins

    @property
    def temporary(self) -> int:
        """What a gradient needs besides its inputs and itself."""
        return self.activations + max(self.recomputed, self.logits)

    @property
    def total(self) -> int:
        return self.params + self.gradients + self.optimizer + self.temporary


def count_training_memory(
    config: TransformerConfig,
    compute: ComputeConfig,
    optimizer: OptimizerConfig,
    *,
    batch_sequences: int,
    length_tokens: int,
    loss_tile_tokens: int = 4096,
) -> TrainingMemory:
    """Return what a step on one microbatch of such a batch holds.

    Activations are what differentiation keeps, parameters left out, under the compute's remat
    policy; a compiler that fuses or recomputes holds less, one with scratch buffers more: XLA's
    temporary buffers on a CPU are within 12%, under rematerialisation 25%, of the sum; with
    experts, whose tokens are moved to buffers and back, they are up to 17% and 30% above it. The
    buffers that dropless experts keep for an exchange over a mesh are not counted.
    """
    model = Transformer(config, compute)
    shapes = param_shapes(model)
    state = jax.eval_shape(
        make_optimizer(optimizer, logical_axes(model), width_ratio=config.width_ratio).init, shapes
    )
    averages = tree_bytes(shapes) if optimizer.ema_decay is not None else 0
    shape = dict(batch_sequences=batch_sequences, length_tokens=length_tokens)
    kept = count_activation_bytes(config, compute, **shape)
    without = dataclasses.replace(compute, remat="none")
    everything = count_activation_bytes(config, without, **shape)
    tile = min(loss_tile_tokens, batch_sequences * length_tokens)
    return TrainingMemory(
        params=tree_bytes(shapes),
        gradients=tree_bytes(shapes),
        optimizer=tree_bytes(state) + averages,
        activations=kept,
        recomputed=max(0, everything - kept) // config.num_layers,
        logits=2 * 4 * tile * config.padded_vocab_size,
    )


def count_activation_bytes(
    config: TransformerConfig,
    compute: ComputeConfig,
    *,
    batch_sequences: int,
    length_tokens: int,
) -> int:
    """Return the bytes that differentiating embeddings and layers keeps for the backward pass."""
    model = Transformer(config, compute)
    tokens = jax.ShapeDtypeStruct((batch_sequences, length_tokens), jnp.int32)

    def residuals(params, tokens, segment_ids, positions, key):
        def hidden(params):
            return model.apply(
                {"params": params},
                tokens,
                segment_ids=segment_ids,
                positions=positions,
                deterministic=not config.dropout_rate,
                rngs={"dropout": key},
                method="hidden",
            )[0]

        return jax.vjp(hidden, params)[1]

    inputs = (
        param_shapes(model),
        tokens,
        tokens,
        tokens,
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    jaxpr = jax.make_jaxpr(residuals)(*inputs).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var) and v not in given}
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def tree_bytes(tree) -> int:
    """Return the bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
