"""Cross-entropy that never holds all the logits. First floor: a pure function of its inputs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.objectives.tiles import map_tiles, sum_tiles

Unembed = Callable[[dict, Float[Array, "B T D"]], Float[Array, "B T V"]]
Sums = dict[str, Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def tiled_cross_entropy(
    unembed: Unembed,
    tile_tokens: int,
    z_loss: float,
    head: dict,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Sums]:
    """Return Σ weights · (−log p(target) + z_loss · log² Z), and the sums it is made of.

    `unembed(head, hidden)` gives float32 logits; they exist for about `tile_tokens` at a time on
    each device.
    The gradient is taken in the same pass over the tiles, so that no logits are kept or recomputed.
    The sums (`loss`, `z_loss`, `correct`, all weighted, in nats or tokens) and the weights carry no
    gradient.

    Source: z-loss is Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    sums, _ = sum_tiles(
        lambda h, t, w: (_tile_sums(unembed(head, h), t, w, z_loss)[0], None),
        tile_tokens,
        (hidden, targets, weights),
    )
    return sums["loss"] + z_loss * sums["z_loss"], sums


def tiled_token_nats(
    unembed: Unembed,
    tile_tokens: int,
    head: dict,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Return −log p(target) of every token, in nats; made for evaluation, without a gradient."""

    def one(h, t):
        logits = unembed(head, h)
        return jax.nn.logsumexp(logits, axis=-1) - _chosen(logits, t)[0]

    return map_tiles(one, tile_tokens, (hidden, targets))


def _tile_sums(logits, targets, weights, z_loss: float) -> tuple[Sums, Array]:
    """Return a tile's sums and the gradient of its part of the objective towards its logits."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_z = (jnp.log(total) + largest)[..., 0]
    chosen, is_target = _chosen(logits, targets)
    sums = {
        "loss": jnp.sum(weights * (log_z - chosen)),
        "z_loss": jnp.sum(weights * log_z**2),
        "correct": jnp.sum(weights * (chosen >= largest[..., 0])),
    }
    scale = weights * (1.0 + 2.0 * z_loss * log_z)
    gradient = exponentials * (scale[..., None] / total)
    return sums, gradient - jnp.where(is_target, weights[..., None], 0.0)


def _chosen(logits, targets) -> tuple[Array, Array]:
    """Return the targets' logits, and where they are among the logits."""
    # compared rather than gathered: a vocabulary split over devices stays where it is
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), is_target


def _forward(unembed, tile_tokens, z_loss, head, hidden, targets, weights):
    def one(h, t, w):
        logits, pullback = jax.vjp(unembed, head, h)
        sums, gradient = _tile_sums(logits, t, w, z_loss)
        head_gradient, hidden_gradient = pullback(gradient)
        return (sums, head_gradient), hidden_gradient

    (sums, head_gradient), hidden_gradient = sum_tiles(one, tile_tokens, (hidden, targets, weights))
    return (sums["loss"] + z_loss * sums["z_loss"], sums), (head_gradient, hidden_gradient)


def _backward(unembed, tile_tokens, z_loss, gradients, cotangents):
    head_gradient, hidden_gradient = jax.tree.map(
        lambda x: (x * cotangents[0]).astype(x.dtype), gradients
    )
    return head_gradient, hidden_gradient, None, None


tiled_cross_entropy.defvjp(_forward, _backward)
