"""A model and an objective made into the loss function that the train step takes. Second floor."""

from collections.abc import Callable

from jaxtyping import Array, Float

from llm.models.transformer import Transformer, head_params
from llm.objectives.causal_lm import Batch, causal_lm_loss
from llm.objectives.cross_entropy import tiled_token_nats
from llm.training.step import LossFn


def make_causal_lm_loss(
    model: Transformer, *, z_loss: float = 0.0, tile_tokens: int = 4096
) -> LossFn:
    """Return (params, batch, key) → (objective, sums): the causal loss of this model."""

    def unembed(head, hidden):
        return model.apply({"params": head}, hidden, method="unembed")

    def loss_fn(params, batch, key):
        def hidden_fn(tokens, **kwargs):
            dropout = {"dropout": key} if model.config.dropout_rate and key is not None else {}
            return model.apply(
                {"params": params},
                tokens,
                method="hidden",
                deterministic=not dropout,
                rngs=dropout,
                **kwargs,
            )

        head = head_params(model.config, params)
        return causal_lm_loss(
            hidden_fn, unembed, head, batch, z_loss=z_loss, tile_tokens=tile_tokens
        )

    return loss_fn


def make_token_nats(
    model: Transformer, *, tile_tokens: int = 4096
) -> Callable[[dict, Batch], Float[Array, "B T"]]:
    """Return (params, batch) → −log p of each target in nats: what the loss is the sum of."""

    def unembed(head, hidden):
        return model.apply({"params": head}, hidden, method="unembed")

    def token_nats(params, batch):
        hidden, _ = model.apply(
            {"params": params},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            method="hidden",
        )
        head = head_params(model.config, params)
        return tiled_token_nats(unembed, tile_tokens, head, hidden, batch["targets"])

    return token_nats
