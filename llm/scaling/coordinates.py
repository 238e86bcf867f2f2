"""The coordinate check of a parametrisation: how activations grow with width. Third floor.

Source: Yang et al. 2022, arXiv:2203.03466, appendix D.1: by how much a few steps of training change
activations should not depend on the width. Under the standard parametrisation it does.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.layers import Attention, FeedForward, Layer
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.models.unstack import unstack, unstacked
from llm.training.config import OptimizerConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.state import fresh_state
from llm.training.step import make_step_fn


def activations(
    model: Transformer, params: dict, tokens: Int[Array, "B T"]
) -> dict[str, list[Float[Array, "B T F"]]]:
    """Return what attention, feed-forward and layers put out, of each layer, and the logits."""
    flat = unstacked(model)
    logits, captured = flat.apply(
        {"params": unstack(model, params)},
        tokens,
        capture_intermediates=lambda module, _: isinstance(module, Attention | FeedForward | Layer),
        mutable=["intermediates"],
    )
    layers = [captured["intermediates"][f"prefix_{i}"] for i in range(model.config.num_layers)]
    found = {
        "attention": [layer["attention"]["__call__"][0][0] for layer in layers],
        "feed-forward": [layer["mlp"]["__call__"][0] for layer in layers],
        "residual": [layer["__call__"][0][0] for layer in layers],
        "logits": [logits[..., : model.config.vocab_size]],  # the padding's are −inf
    }
    return found


def coordinate_check(
    configs: Sequence[TransformerConfig],
    optimizer: OptimizerConfig,
    *,
    steps: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    batch_sequences: int = 4,
    length_tokens: int = 32,
) -> dict[str, Float[np.ndarray, " W"]]:
    """Return by how much activations have changed after some steps on one batch of random tokens:
    the root mean square, averaged over layers and seeds. Configs differ in width.

    The change and not the size: initial logits shrink with width under muP, as they may.
    """
    sizes = [
        _changes_after(config, optimizer, steps, seeds, (batch_sequences, length_tokens))
        for config in configs
    ]
    return {name: np.array([each[name] for each in sizes]) for name in sizes[0]}


def growth_exponent(widths: Sequence[int], sizes: Float[np.ndarray, " W"]) -> float:
    """Return the slope of log size over log width: 0 is flat."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def _changes_after(config, optimizer_config, steps: int, seeds, shape) -> dict[str, float]:
    model = Transformer(config, ComputeConfig(attention_kernel="xla"))
    optimizer = make_optimizer(
        optimizer_config, logical_axes(model), width_ratio=config.width_ratio
    )
    step = make_step_fn(make_causal_lm_loss(model), optimizer, optimizer_config, _constant)

    def one(seed):
        key, data_key = jax.random.split(jax.random.key(seed))
        tokens = jax.random.randint(data_key, (shape[0], shape[1] + 1), 0, config.vocab_size)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_weights": jnp.ones(shape),
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
            "cursor": jnp.uint32(0),
        }
        state = fresh_state(functools.partial(init_params, model), optimizer, key, 1.0)
        before = activations(model, state.params, batch["tokens"])
        body = lambda _, state: step(state, batch, optimizer_config.learning_rate)[0]  # noqa: E731
        state = jax.lax.fori_loop(0, steps, body, state)
        after = activations(model, state.params, batch["tokens"])
        return {
            name: jnp.mean(
                jnp.stack([_rms(a - b) for a, b in zip(outputs, before[name], strict=True)])
            )
            for name, outputs in after.items()
        }

    changes = jax.jit(jax.vmap(one))(jnp.asarray(seeds))
    return {name: float(np.mean(x)) for name, x in changes.items()}


def _constant(step) -> float:
    return 1.0


def _rms(x: Array) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
