"""What the models say of responses: log-probabilities, entropies, values. Third floor."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer, head_params
from llm.objectives.cross_entropy import cut_tiles, join_tiles, num_tiles
from llm.rl.rollout import Rollout

PerToken = Float[Array, "B M"]


def response_log_probs(
    model: Transformer,
    params: dict,
    rollout: Rollout,
    *,
    temperature: float,
    tile_tokens: int = 4096,
) -> tuple[PerToken, PerToken]:
    """Return log softmax(logits / temperature) of each response token, and that softmax's entropy.

    In nats, 0 where the mask is. Logits exist for about tile_tokens at a time, in the backward pass
    too, where they are computed again.
    """
    hidden, _ = model.apply(
        {"params": params},
        rollout.tokens,
        segment_ids=rollout.segment_ids,
        positions=rollout.positions,
        method="hidden",
    )
    head = head_params(model.config, params)
    length = rollout.mask.shape[1]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tile(hidden, tokens):
        logits = model.apply({"params": head}, hidden, method="unembed") / temperature
        logits = jnp.maximum(logits, -1e30)  # 0 · −inf of the padded vocabulary would be NaN
        log_z = jax.nn.logsumexp(logits, axis=-1)
        is_chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
        chosen = jnp.sum(jnp.where(is_chosen, logits, 0.0), axis=-1)
        mean_logit = jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
        return chosen - log_z, log_z - mean_logit

    tiles = num_tiles(*rollout.mask.shape, tile_tokens)
    cut = [cut_tiles(x[:, -length:], tiles) for x in (hidden[:, :-1], rollout.tokens)]
    _, out = jax.lax.scan(lambda _, xs: (None, tile(*xs)), None, tuple(cut))
    log_probs, entropies = (join_tiles(x) for x in out)
    here = rollout.mask > 0
    return jnp.where(here, log_probs, 0.0), jnp.where(here, entropies, 0.0)


def response_values(model: ScalarModel, params: dict, rollout: Rollout) -> PerToken:
    """Return the value before each response token is drawn; 0 where the mask is."""
    values = model.apply(
        {"params": params},
        rollout.tokens,
        segment_ids=rollout.segment_ids,
        positions=rollout.positions,
    )
    return jnp.where(rollout.mask > 0, values[:, :-1][:, -rollout.mask.shape[1] :], 0.0)
