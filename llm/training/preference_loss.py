"""Losses on batches of comparisons, as the train step takes them: scores, or a policy's own
log-probabilities. Second floor."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm.models.scalar import ScalarModel, at_last_token
from llm.models.transformer import Transformer, head_params
from llm.objectives.cross_entropy import cut_tiles, join_tiles, num_tiles
from llm.objectives.preference import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pairs_of,
    simpo_loss,
)
from llm.training.config import PreferenceConfig
from llm.training.step import Batch, LossFn

Slots = Float[Array, "G K"]


def slot_rows(batch: Batch) -> Batch:
    """Return a batch's responses as rows: [G, K·T] arrays become [G·K, T]."""
    names = ("tokens", "segment_ids", "positions", "response_mask")
    slots = batch["levels"].shape[1]
    return {n: batch[n].reshape(batch[n].shape[0] * slots, -1) for n in names if n in batch}


def response_scores(model: ScalarModel, params: dict, batch: Batch, **dropout) -> Slots:
    """Return a reward model's score of every slot."""
    rows = slot_rows(batch)
    values = model.apply(
        {"params": params},
        rows["tokens"],
        segment_ids=rows["segment_ids"],
        positions=rows["positions"],
        **dropout,
    )
    return at_last_token(values, rows["segment_ids"]).reshape(batch["levels"].shape)


def make_reward_loss(model: ScalarModel, *, tie_threshold: float = 0.0) -> LossFn:
    """Return Bradley–Terry's loss of a batch of comparisons, counted in "prompts"."""

    def loss_fn(params, batch, key):
        dropout = {}
        if model.config.dropout_rate and key is not None:
            dropout = {"deterministic": False, "rngs": {"dropout": key}}
        scores = response_scores(model, params, batch, **dropout)
        losses, sums = bradley_terry_loss(
            scores,
            batch["levels"],
            batch["present"],
            batch["margins"],
            tie_threshold=tie_threshold,
        )
        wins, _ = pairs_of(batch["levels"], batch["present"])
        each = jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1)
        right = jnp.where(wins, scores[:, :, None] > scores[:, None, :], False)
        loss = jnp.sum(losses)
        return loss, {
            "loss": loss,
            "accuracy": jnp.sum(jnp.sum(right, axis=(1, 2)) / each),
            "prompts": sums["prompts"],
        }

    return loss_fn


def response_log_prob_sums(
    model: Transformer, params: dict, rows: Batch, *, tile_tokens: int = 4096
) -> Float[Array, " B"]:
    """Return each row's log-probability of its response tokens, summed, in nats."""
    hidden, _ = model.apply(
        {"params": params},
        rows["tokens"],
        segment_ids=rows["segment_ids"],
        positions=rows["positions"],
        method="hidden",
    )
    head = head_params(model.config, params)
    targets = jnp.roll(rows["tokens"], -1, axis=1)
    # A response's first token is predicted by the prompt's last.
    weights = jnp.roll(rows["response_mask"], -1, axis=1).at[:, -1].set(0.0)

    @jax.checkpoint
    def tile(hidden, targets, weights):
        logits = model.apply({"params": head}, hidden, method="unembed")
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return weights * (chosen - jax.nn.logsumexp(logits, axis=-1))

    tiles = num_tiles(*targets.shape, tile_tokens)
    cut = tuple(cut_tiles(x, tiles) for x in (hidden, targets, weights))
    _, out = jax.lax.scan(lambda _, xs: (None, tile(*xs)), None, cut)
    return jnp.sum(join_tiles(out), axis=1)


def make_preference_loss(
    model: Transformer,
    reference: Transformer,
    config: PreferenceConfig,
    *,
    tile_tokens: int = 4096,
) -> LossFn:
    """Return a direct preference loss, counted in "prompts"; each prompt's pairs weigh alike.

    Parameters are {"policy", "reference"}, the second only for methods that have a reference. Its
    sums: loss, accuracy of the implicit rewards, and their margin.
    """

    def loss_fn(params, batch, key):
        del key
        rows, shape = slot_rows(batch), batch["levels"].shape
        tokens = jnp.maximum(jnp.sum(rows["response_mask"], axis=1), 1.0).reshape(shape)

        def sums_of(module, tree, rows):
            return response_log_prob_sums(module, tree, rows, tile_tokens=tile_tokens)

        policy = sums_of(model, params["policy"], rows).reshape(shape)
        if config.needs_reference:
            theirs = sums_of(reference, params["reference"], rows).reshape(shape)
            theirs = jax.lax.stop_gradient(theirs)
        else:
            theirs = jnp.zeros(shape)
        wins, _ = pairs_of(batch["levels"], batch["present"])
        per_prompt = jnp.sum(wins, axis=(1, 2))
        weights = wins / jnp.maximum(per_prompt, 1)[:, None, None]
        implicit = config.beta * (policy - theirs)
        if config.method in ("orpo", "simpo"):
            implicit = config.beta * policy / tokens
        margin = implicit[:, :, None] - implicit[:, None, :]
        if config.method == "kto":
            shuffled = mismatched(rows)
            kl = jnp.mean(
                sums_of(model, jax.lax.stop_gradient(params["policy"]), shuffled)
                - sums_of(reference, params["reference"], shuffled)
            )
            present = batch["present"]
            loss = kto_loss(
                policy.reshape(-1),
                theirs.reshape(-1),
                (batch["levels"] >= config.desirable_level).reshape(-1),
                present.reshape(-1),
                kl,
                beta=config.beta,
            ).reshape(shape)
            count = jnp.sum(present, axis=1)
            objective = jnp.sum(jnp.sum(loss, axis=1) / jnp.maximum(count, 1))
            prompts = jnp.sum(count > 0)
        else:
            loss = _pair_losses(policy, theirs, tokens, wins.shape, config)
            objective = jnp.sum(jnp.where(wins, loss, 0.0) * weights)
            prompts = jnp.sum(per_prompt > 0)
        return objective, {
            "loss": objective,
            "accuracy": jnp.sum(weights * (margin > 0)),
            "margin": jnp.sum(weights * margin),
            "prompts": prompts.astype(jnp.float32),
        }

    return loss_fn


def _pair_losses(
    policy: Slots, theirs: Slots, tokens: Slots, shape: tuple[int, ...], config: PreferenceConfig
) -> Float[Array, "G K K"]:
    """Return the loss of every ordered pair of slots, the first taken for the chosen one."""

    def chosen(x):
        return jnp.broadcast_to(x[:, :, None], shape).reshape(-1)

    def rejected(x):
        return jnp.broadcast_to(x[:, None, :], shape).reshape(-1)

    ours = (chosen(policy), rejected(policy))
    both = (*ours, chosen(theirs), rejected(theirs))
    counted = (*ours, chosen(tokens), rejected(tokens))
    match config.method:
        case "dpo":
            smoothing = config.label_smoothing
            losses = dpo_loss(*both, beta=config.beta, label_smoothing=smoothing)
        case "ipo":
            losses = ipo_loss(*both, beta=config.beta)
        case "orpo":
            losses = orpo_loss(*counted, beta=config.beta)
        case "simpo":
            losses = simpo_loss(*counted, beta=config.beta, margin=config.simpo_margin)
    return losses.reshape(shape)


def mismatched(rows: Batch) -> Batch:
    """Return each row's prompt with the response of the next row (KTO's estimate of divergence).

    Rows must be padded on the right. What does not fit is cut; rows without a response have none.
    """
    tokens, mask = rows["tokens"], rows["response_mask"]
    length = tokens.shape[1]
    starts = jnp.argmax(mask, axis=1)
    counts = jnp.sum(mask, axis=1).astype(jnp.int32)
    index = jnp.arange(length)
    place = index - starts[:, None]  # of the response's token
    theirs = jnp.clip(place + jnp.roll(starts, -1)[:, None], 0, length - 1)
    response = jnp.take_along_axis(jnp.roll(tokens, -1, axis=0), theirs, axis=1)
    is_response: Bool[Array, "B T"] = (place >= 0) & (place < jnp.roll(counts, -1)[:, None])
    is_response &= (counts > 0)[:, None]
    is_prompt = (place < 0) & (rows["segment_ids"] > 0) & (counts > 0)[:, None]
    return {
        "tokens": jnp.where(is_response, response, jnp.where(is_prompt, tokens, 0)),
        "segment_ids": (is_prompt | is_response).astype(jnp.int32),
        "positions": jnp.broadcast_to(index, tokens.shape),
        "response_mask": is_response.astype(jnp.float32),
    }
