"""What the models say of responses: log-probabilities, entropies, values. Third floor.

Routers of models with experts get no losses of their own from it (see preference_loss).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer, head_params, init_cache
from llm.objectives.tiles import map_tiles, num_tiles
from llm.rl.models import Models
from llm.rl.rollout import Rollout

PerToken = Float[Array, "B M"]


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Said(NamedTuple):
    """What the models that learn say of each response token; 0 where the mask is."""

    log_probs: PerToken
    entropies: PerToken
    values: PerToken  # before the token is drawn; 0 where no value is learnt


class Forward:
    """The forward passes, with what every one of them needs to know.

    With a `group`, so many responses to each prompt stand side by side in what is looked at.
    """

    def __init__(self, models: Models, temperature: float, tile_tokens: int, group: int = 1):
        self._models = models
        self._options = {"temperature": temperature, "tile_tokens": tile_tokens, "group": group}

    def __call__(self, params: dict, rollout: Rollout) -> Said:
        policy, value = self._models
        said = response_log_probs(policy, params["policy"], rollout, **self._options)
        if value is None:
            return Said(*said, jnp.zeros_like(rollout.mask))
        return Said(*said, response_values(value, self._models.value_params(params), rollout))

    def reference(self, params: dict, frozen: dict, rollout: Rollout) -> PerToken:
        """Return the log-probabilities of the frozen reference."""
        model, own = self._models.reference, self._models.reference_params(params, frozen)
        return response_log_probs(model, own, rollout, **self._options)[0]


def in_parts(look: Callable[[Rollout], Any], rollout: Rollout, parts: int) -> Any:
    """Return look(rollout), of which so many parts are looked at one after the other."""
    if parts == 1:
        return look(rollout)
    # Strided, so that each device keeps the responses that it holds.
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), rollout)
    looks = jax.lax.map(look, cut)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), looks)


def response_log_probs(
    model: Transformer,
    params: dict,
    rollout: Rollout,
    *,
    temperature: float,
    tile_tokens: int = 4096,
    group: int = 1,
) -> tuple[PerToken, PerToken]:
    """Return log softmax(logits / temperature) of each response token, and that softmax's entropy.

    In nats, 0 where the mask is. Logits exist for about tile_tokens at a time on each device, in
    the backward pass too, where they are computed again if there is more than one tile. With a
    `group`, so many responses to each prompt stand side by side, and the prompt is read once for
    them.
    """
    hidden = _hidden_of_groups if group > 1 else _hidden_of_rows
    hidden = hidden(model, params, rollout, group)
    head = head_params(model.config, params)
    length = rollout.mask.shape[1]

    def tile(hidden, tokens):
        logits = model.apply({"params": head}, hidden, method="unembed") / temperature
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        terms = jnp.exp(logits - largest)  # once: it is what this costs beside the product
        total = jnp.sum(terms, axis=-1)
        log_z = jnp.log(total) + largest[..., 0]
        is_chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
        chosen = jnp.sum(jnp.where(is_chosen, logits, 0.0), axis=-1)
        finite = jnp.where(terms > 0, logits, 0.0)  # 0 · −inf of the padded vocabulary is NaN
        return chosen - log_z, log_z - jnp.sum(terms * finite, axis=-1) / total

    arrays = hidden, rollout.tokens[:, -length:]
    if num_tiles(*rollout.mask.shape, tile_tokens) == 1:
        log_probs, entropies = tile(*arrays)
    else:
        again = jax.checkpoint(tile, prevent_cse=False)
        log_probs, entropies = map_tiles(again, tile_tokens, arrays)
    here = rollout.mask > 0
    return jnp.where(here, log_probs, 0.0), jnp.where(here, entropies, 0.0)


def _hidden_of_rows(model: Transformer, params: dict, rollout: Rollout, group: int):
    """Return the hidden states [B M D] that predict the tokens of each response."""
    del group
    hidden, _ = model.apply(
        {"params": params},
        rollout.tokens,
        segment_ids=rollout.segment_ids,
        positions=rollout.positions,
        method="hidden",
    )
    return hidden[:, :-1][:, -rollout.mask.shape[1] :]


def _hidden_of_groups(model: Transformer, params: dict, rollout: Rollout, group: int):
    """Return the same with each group's prompt read once, into keys and values that all share."""
    length = rollout.mask.shape[1]
    width = rollout.tokens.shape[1] - length

    def read(rows: slice, columns: slice, cache):
        return model.apply(
            {"params": params},
            rollout.tokens[rows, columns],
            segment_ids=rollout.segment_ids[rows, columns],
            positions=rollout.positions[rows, columns],
            cache=cache,
            method="hidden",
        )

    # The last token predicts nothing: it is not read.
    size = width + length - 1
    cache = init_cache(
        model.config, rollout.tokens.shape[0] // group, size, jnp.dtype(model.compute.dtype)
    )
    prompt, cache = read(slice(None, None, group), slice(0, width), cache)
    first = jnp.repeat(prompt[:, -1:], group, axis=0)
    if length == 1:
        return first
    cache = cache.replace(
        layers=jax.tree.map(lambda x: jnp.repeat(x, group, axis=x.ndim - 4), cache.layers),
        segments=jnp.repeat(cache.segments, group, axis=0),
    )
    rest, _ = read(slice(None), slice(width, size), cache)
    return jnp.concatenate([first, rest], axis=1)


def response_values(model: ScalarModel, params: dict, rollout: Rollout) -> PerToken:
    """Return the value before each response token is drawn; 0 where the mask is."""
    values = model.apply(
        {"params": params},
        rollout.tokens,
        segment_ids=rollout.segment_ids,
        positions=rollout.positions,
    )
    return jnp.where(rollout.mask > 0, values[:, :-1][:, -rollout.mask.shape[1] :], 0.0)
