"""Losses on batches of comparisons, as the train step takes them: scores, or a policy's own
log-probabilities. Second floor.

Routers of a model with experts get no losses of their own here, as in RLHF: such stages are short,
and keep the balance that pretraining and fine-tuning asked for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llm.data.loader import Batch as HostBatch
from llm.models.scalar import ScalarModel, at_last_token
from llm.models.transformer import Transformer, head_params, unembed
from llm.objectives.preference import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pairs_of,
    simpo_loss,
)
from llm.objectives.tiles import map_tiles
from llm.parallel.hosts import local_rows, place_batch
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
        logits = unembed(model, head, hidden)
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return weights * (chosen - jax.nn.logsumexp(logits, axis=-1))

    return jnp.sum(map_tiles(tile, tile_tokens, (hidden, targets, weights)), axis=1)


def make_reference_step(
    model: Transformer,
    reference: Transformer,
    mesh: Mesh,
    config: PreferenceConfig,
    *,
    tile_tokens: int = 4096,
) -> "ReferenceStep":
    """Return (policy's parameters, reference's, batch) → the batch with what its loss needs beside.

    `reference_log_probs` [G K]: the train step needs no second model then. For KTO `mismatched_kl`
    [G] too, the mean log-ratio of responses to prompts that are not theirs, the same in each row:
    it is of the whole batch, into however many parts the train step cuts it.
    """

    def log_probs(module: Transformer, params: dict, rows: Batch) -> Float[Array, " B"]:
        return response_log_prob_sums(module, params, rows, tile_tokens=tile_tokens)

    @jax.jit
    def look(params, reference_params, batch):
        shape = batch["levels"].shape
        theirs = log_probs(reference, reference_params, slot_rows(batch))
        found = {"reference_log_probs": theirs.reshape(shape)}
        if config.method == "kto":
            rows, real = mismatched(batch)
            ratios = log_probs(model, params, rows) - log_probs(reference, reference_params, rows)
            mean = jnp.sum(jnp.where(real, ratios, 0.0)) / jnp.maximum(jnp.sum(real), 1)
            found["mismatched_kl"] = jnp.full(shape[0], mean)
        return found

    return ReferenceStep(look if config.needs_reference else None, mesh)


@dataclasses.dataclass(frozen=True)
class ReferenceStep:
    """A jitted look at responses, called with this host's slice of the batch, or lowered with
    shapes; without one batches stay as they are."""

    jitted: Any
    mesh: Mesh

    def __call__(self, params: dict, reference_params: dict, batch: HostBatch) -> HostBatch:
        if self.jitted is None:
            return batch
        found = self.jitted(params, reference_params, place_batch(_arrays(batch), self.mesh))
        return batch | {name: local_rows(x, self.mesh) for name, x in found.items()}

    def lower(self, params: dict, reference_params: dict, batch: dict) -> jax.stages.Lowered:
        """Lower for the mesh's devices, which need not be here."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(params, reference_params, _arrays(batch))


def _arrays(batch: dict) -> dict:
    return {name: x for name, x in batch.items() if name != "cursor"}


def make_preference_loss(
    model: Transformer, config: PreferenceConfig, *, tile_tokens: int = 4096
) -> LossFn:
    """Return a direct preference loss, counted in "prompts"; each prompt's pairs weigh alike.

    Batches bear what `make_reference_step` adds. Sums: loss, accuracy of the implicit rewards, and
    their margin, over pairs.
    """

    def loss_fn(params, batch, key):
        del key
        rows, shape = slot_rows(batch), batch["levels"].shape
        tokens = jnp.maximum(jnp.sum(rows["response_mask"], axis=1), 1.0).reshape(shape)
        policy = response_log_prob_sums(model, params, rows, tile_tokens=tile_tokens)
        policy = policy.reshape(shape)
        theirs = batch.get("reference_log_probs", jnp.zeros(shape))
        wins, _ = pairs_of(batch["levels"], batch["present"])
        per_prompt = jnp.sum(wins, axis=(1, 2))
        weights = wins / jnp.maximum(per_prompt, 1)[:, None, None]
        if config.method == "kto":
            objective, prompts = _kto(policy, theirs, batch, config)
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
    policy: Slots, theirs: Slots, batch: Batch, config: PreferenceConfig
) -> tuple[Float[Array, ""], Array]:
    """Return KTO's loss, the mean of each prompt's responses summed, and the number of prompts."""
    present = batch["present"]
    losses = kto_loss(
        policy.reshape(-1),
        theirs.reshape(-1),
        (batch["levels"] >= config.desirable_level).reshape(-1),
        present.reshape(-1),
        batch["mismatched_kl"][0],
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
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


def mismatched(batch: Batch) -> tuple[Batch, Bool[Array, " B"]]:
    """Return each response's prompt with a response to another, as rows, and which rows have one.

    Rows must be padded on the right. What does not fit is cut; absent responses have none.
    """
    rows = slot_rows(batch)
    donors, real = _donors(rows, batch["present"])
    tokens, mask = rows["tokens"], rows["response_mask"]
    length = tokens.shape[1]
    starts = jnp.argmax(mask, axis=1)
    counts = jnp.sum(mask, axis=1).astype(jnp.int32)
    index = jnp.arange(length)
    place = index - starts[:, None]  # of the response's token
    theirs = jnp.clip(place + starts[donors][:, None], 0, length - 1)
    response = jnp.take_along_axis(tokens[donors], theirs, axis=1)
    is_response = real[:, None] & (place >= 0) & (place < counts[donors][:, None])
    is_prompt = real[:, None] & (place < 0) & (rows["segment_ids"] > 0)
    mismatched_rows = {
        "tokens": jnp.where(is_response, response, jnp.where(is_prompt, tokens, 0)),
        "segment_ids": (is_prompt | is_response).astype(jnp.int32),
        "positions": jnp.broadcast_to(index, tokens.shape),
        "response_mask": is_response.astype(jnp.float32),
    }
    return mismatched_rows, real


def _donors(rows: Batch, present: Bool[Array, "G K"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Return whose response each row's prompt is to get, and which rows get one.

    It is of the next prompt in the batch that is answered and another text; its responses take
    turns.
    """
    num_prompts, slots = present.shape
    is_prompt = (rows["segment_ids"] > 0) & (rows["response_mask"] == 0)
    texts = jnp.where(is_prompt, rows["tokens"], -1).reshape(num_prompts, slots, -1)
    first = jnp.argmax(present, axis=1)
    text = jnp.take_along_axis(texts, first[:, None, None], axis=1)[:, 0]
    count = jnp.sum(present, axis=1)
    other = (count > 0) & jnp.any(text[:, None] != text[None], axis=-1)
    index = jnp.arange(num_prompts)
    distance = (index - index[:, None]) % num_prompts
    chosen = jnp.argmin(jnp.where(other, distance, num_prompts), axis=1)
    turn = jnp.arange(slots) % jnp.maximum(count[chosen], 1)[:, None]
    in_order = jnp.argsort(~present, axis=1)  # stable: slots with a response first
    slot = jnp.take_along_axis(in_order[chosen], turn, axis=1)
    real = present & jnp.any(other, axis=1, keepdims=True)
    return (chosen[:, None] * slots + slot).reshape(-1), real.reshape(-1)
