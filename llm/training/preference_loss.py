"""Losses on batches of comparisons, as the train step takes them: scores, or a policy's own
log-probabilities. Second floor."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
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
from llm.training.step import Batch, LossFn, local_rows, place_batch

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


def make_reference_step(
    reference: Transformer, mesh: Mesh, config: PreferenceConfig, *, tile_tokens: int = 4096
) -> Callable[[dict, Batch], Batch]:
    """Return (reference's parameters, batch) → the batch with what the reference says of it.

    `reference_log_probs` and, for KTO, `reference_mismatched`, both [G K]: the train step needs
    no second model then.
    """

    @jax.jit
    def look(params, batch):
        rows, shape = slot_rows(batch), batch["levels"].shape
        found = {"reference_log_probs": rows}
        if config.method == "kto":
            found["reference_mismatched"] = mismatched(rows)
        return {
            name: response_log_prob_sums(reference, params, part, tile_tokens=tile_tokens).reshape(
                shape
            )
            for name, part in found.items()
        }

    def step(params: dict, batch: Batch) -> Batch:
        if not config.needs_reference:
            return batch
        arrays = {name: x for name, x in batch.items() if name != "cursor"}
        found = look(params, place_batch(arrays, mesh))
        return batch | {name: local_rows(x) for name, x in found.items()}

    return step


def make_preference_loss(
    model: Transformer, config: PreferenceConfig, *, tile_tokens: int = 4096
) -> LossFn:
    """Return a direct preference loss, counted in "prompts"; each prompt's pairs weigh alike.

    Batches bear what `make_reference_step` adds. Sums: loss, accuracy of the implicit rewards, and
    their margin.
    """

    def log_probs_of(params, rows: Batch) -> Float[Array, " B"]:
        return response_log_prob_sums(model, params, rows, tile_tokens=tile_tokens)

    def loss_fn(params, batch, key):
        del key
        rows, shape = slot_rows(batch), batch["levels"].shape
        tokens = jnp.maximum(jnp.sum(rows["response_mask"], axis=1), 1.0).reshape(shape)
        policy = log_probs_of(params, rows).reshape(shape)
        theirs = batch.get("reference_log_probs", jnp.zeros(shape))
        wins, _ = pairs_of(batch["levels"], batch["present"])
        per_prompt = jnp.sum(wins, axis=(1, 2))
        weights = wins / jnp.maximum(per_prompt, 1)[:, None, None]
        if config.method == "kto":
            ours = log_probs_of(jax.lax.stop_gradient(params), mismatched(rows)).reshape(shape)
            objective, prompts = _kto(policy, theirs, ours, batch, config)
        else:
            losses = _pair_losses(policy, theirs, tokens, wins.shape, config)
            objective = jnp.sum(jnp.where(wins, losses, 0.0) * weights)
            prompts = jnp.sum(per_prompt > 0)
        per_token = config.method in ("orpo", "simpo")
        implicit = config.beta * (policy / tokens if per_token else policy - theirs)
        margin = implicit[:, :, None] - implicit[:, None, :]
        return objective, {
            "loss": objective,
            "accuracy": jnp.sum(weights * (margin > 0)),
            "margin": jnp.sum(weights * margin),
            "prompts": prompts.astype(jnp.float32),
        }

    return loss_fn


def _kto(
    policy: Slots, theirs: Slots, mismatched_ours: Slots, batch: Batch, config: PreferenceConfig
) -> tuple[Float[Array, ""], Array]:
    """Return KTO's loss, the mean of each prompt's responses summed, and the number of prompts."""
    present = batch["present"]
    log_ratio = jnp.where(present, mismatched_ours - batch["reference_mismatched"], 0.0)
    losses = kto_loss(
        policy.reshape(-1),
        theirs.reshape(-1),
        (batch["levels"] >= config.desirable_level).reshape(-1),
        present.reshape(-1),
        jnp.sum(log_ratio) / jnp.maximum(jnp.sum(present), 1),
        beta=config.beta,
    ).reshape(present.shape)
    count = jnp.sum(present, axis=1)
    return jnp.sum(jnp.sum(losses, axis=1) / jnp.maximum(count, 1)), jnp.sum(count > 0)


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
