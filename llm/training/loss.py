"""A model and an objective made into the loss function that the train step takes. Second floor."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from llm.models.router import COLLECTION, RouterSums, gather_sums
from llm.models.transformer import Transformer, head_params, unembed
from llm.objectives.causal_lm import Batch, causal_lm_loss
from llm.objectives.cross_entropy import tiled_token_nats
from llm.objectives.router import (
    dropped_share,
    largest_expert_share,
    load_balance_loss,
    router_z_loss,
)
from llm.training.step import LossFn


def make_causal_lm_loss(
    model: Transformer,
    *,
    z_loss: float = 0.0,
    tile_tokens: int = 4096,
    router_balance_weight: float = 0.0,
    router_z_weight: float = 0.0,
) -> LossFn:
    """Return (params, batch, key) → (objective, sums): the causal loss of this model.

    Of a model with experts the objective has the routers' losses too, for each target, so weighted,
    and the sums say what they are: router_balance, router_z, router_largest_share (the busiest
    expert's, of a layer's choices) and router_dropped. They are those of this batch: of one in
    parts, the balance is asked of each part.
    """
    routed = bool(model.config.moe_layers)

    logits = functools.partial(unembed, model)

    def loss_fn(params, batch, key):
        dropout = {"dropout": key} if model.config.dropout_rate and key is not None else {}
        (hidden, _), variables = model.apply(
            {"params": params},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            method="hidden",
            deterministic=not dropout,
            rngs=dropout,
            mutable=[COLLECTION] if routed else [],
        )
        head = head_params(model.config, params)
        objective, sums = causal_lm_loss(
            logits, head, hidden, batch, z_loss=z_loss, tile_tokens=tile_tokens
        )
        if not routed:
            return objective, sums
        routers = _router_losses(gather_sums(variables))
        routers = {name: x * sums["tokens"] for name, x in routers.items()}
        objective += router_balance_weight * routers["router_balance"]
        objective += router_z_weight * routers["router_z"]
        return objective, sums | jax.lax.stop_gradient(routers)

    return loss_fn


def _router_losses(sums: RouterSums) -> dict[str, Float[Array, ""]]:
    return {
        "router_balance": load_balance_loss(sums.counts, sums.scores, sums.tokens),
        "router_z": router_z_loss(sums.squared_log_z, sums.tokens),
        "router_largest_share": largest_expert_share(sums.counts),
        "router_dropped": dropped_share(sums.dropped, sums.counts),
    }


def make_token_nats(
    model: Transformer, *, tile_tokens: int = 4096
) -> Callable[[dict, Batch], Float[Array, "B T"]]:
    """Return (params, batch) → −log p of each target in nats: what the loss is the sum of."""

    logits = functools.partial(unembed, model)

    def token_nats(params, batch):
        hidden, _ = model.apply(
            {"params": params},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            method="hidden",
        )
        head = head_params(model.config, params)
        return tiled_token_nats(logits, tile_tokens, head, hidden, batch["targets"])

    return token_nats
