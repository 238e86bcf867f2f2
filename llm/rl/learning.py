"""One step's learning: scored responses in, policy and value updated. Third floor."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from llm.objectives.policy_gradient import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    kl_k2_sequence,
    kl_k3,
)
from llm.rl.config import AlgorithmConfig, KLConfig, RolloutConfig
from llm.rl.experience import Experience, Looks, make_experience
from llm.rl.forward import response_log_probs, response_values
from llm.rl.models import Models
from llm.rl.rollout import Rollout
from llm.rl.state import RlState
from llm.training.config import OptimizerConfig
from llm.training.schedules import Schedule
from llm.training.step import Batch, Learnt, LossFn, accumulate, make_apply_gradients
from llm.training.trainable import Rates, overlay, split

Metrics = dict[str, Array]


def make_learn_step(
    models: Models,
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    rollout_config: RolloutConfig,
    optimizer: optax.GradientTransformation,
    optimizer_config: OptimizerConfig,
    schedule: Schedule,
    shardings: RlState,
    mesh: Mesh,
    *,
    rates: Rates | None = None,
    ptx_loss: LossFn | None = None,
    accumulate_steps: int = 1,
    tile_tokens: int = 4096,
) -> Callable[..., tuple[RlState, Metrics]]:
    """Return the jitted (state, frozen, rollout, scores, cursor, ptx batch) → (state, metrics).

    It donates the state. Responses to one prompt stand side by side. `cursor` counts the prompts
    that were dealt; the ptx batch is None without a `ptx_loss`.
    """
    forward = _Forward(models, rollout_config.temperature, tile_tokens)
    apply_gradients = make_apply_gradients(optimizer, optimizer_config, rates)
    num_updates = algorithm.epochs * algorithm.minibatches

    def learn(state: RlState, frozen: dict, rollout: Rollout, scores, cursor, ptx: Batch | None):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        key = jax.random.fold_in(key, 1)  # 0 is the rollout's
        looks = forward.look(state.params, frozen, rollout, algorithm.minibatches)
        experience, controllers, metrics = make_experience(
            rollout, looks, scores, state.controllers, algorithm, kl, rollout_config.group
        )
        trainable, still = split(state.params, rates)
        learning_rate = optimizer_config.learning_rate * schedule(state.step)
        beta = state.controllers.kl_coefficient

        def update(carry, step):
            learnt, stopped = carry
            number, rows, ptx_rows = step
            minibatch = jax.tree.map(lambda x: x[rows], experience)
            batch = {"experience": minibatch}
            if ptx_loss is not None:
                batch["ptx"] = jax.tree.map(lambda x: x[ptx_rows], ptx)
            loss_fn = _make_loss(
                forward, algorithm, kl, beta, number == 0, minibatch, batch.get("ptx"), ptx_loss
            )
            grads, objective, sums = accumulate(
                lambda part, *rest: loss_fn(overlay(still, part), *rest),
                learnt.params,
                batch,
                jax.random.fold_in(key, number),
                accumulate_steps,
            )
            new, norm, finite = apply_gradients(learnt, grads, 1.0, objective, learning_rate)
            new = jax.tree.map(lambda a, b: jnp.where(stopped, b, a), new, learnt)
            sums |= {"grad_norm": norm, "finite": finite, "done": ~stopped}
            if algorithm.stop_kl is not None:
                stopped = stopped | (sums["approx_kl"] > algorithm.stop_kl)
            return (new, stopped), sums

        rows = _minibatch_rows(key, rollout.mask.shape[0], algorithm)
        num_ptx = 0 if ptx is None else ptx["tokens"].shape[0]
        ptx_rows = jnp.arange(num_ptx).reshape(algorithm.minibatches, -1)
        steps = (jnp.arange(num_updates), rows, jnp.tile(ptx_rows, (algorithm.epochs, 1)))
        start = Learnt(trainable, state.opt_state, state.ema_params)
        (learnt, _), logs = jax.lax.scan(update, (start, jnp.asarray(False)), steps)
        done = logs.pop("done")
        finite = logs.pop("finite")
        skipped = jnp.where(jnp.all(finite | ~done), 0, state.skipped_in_a_row + 1)
        metrics |= {f"rl/{name}": jnp.sum(x * done) / jnp.sum(done) for name, x in logs.items()}
        metrics |= {
            "rl/updates": jnp.sum(done),
            "train/loss": metrics["rl/policy_loss"],
            "train/grad_norm": metrics.pop("rl/grad_norm"),
            "train/learning_rate": learning_rate,
            "train/skipped_in_a_row": skipped,
        }
        state = state.replace(
            step=state.step + 1,
            params=overlay(still, learnt.params),
            opt_state=learnt.opt_state,
            ema_params=learnt.ema_params,
            cursor=cursor,
            skipped_in_a_row=skipped,
            controllers=controllers,
        )
        return state, metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(learn, donate_argnums=0, out_shardings=(shardings, replicated))


class _Forward:
    """The forward passes, with what every one of them needs to know."""

    def __init__(self, models: Models, temperature: float, tile_tokens: int):
        self.models, self._options = (
            models,
            {"temperature": temperature, "tile_tokens": tile_tokens},
        )

    def policy(self, params: dict, rollout: Rollout):
        return response_log_probs(self.models.policy, params["policy"], rollout, **self._options)

    def values(self, params: dict, rollout: Rollout) -> Array:
        if self.models.value is None:
            return jnp.zeros_like(rollout.mask)
        return response_values(self.models.value, self.models.value_params(params), rollout)

    def look(self, params: dict, frozen: dict, rollout: Rollout, parts: int) -> Looks:
        """Return what the models say of all responses, looked at in so many parts."""
        reference = self.models.reference_params(params, frozen)

        def one(part: Rollout) -> Looks:
            log_probs, _ = self.policy(params, part)
            theirs, _ = response_log_probs(self.models.reference, reference, part, **self._options)
            return Looks(log_probs, theirs, self.values(params, part))

        # Strided, so that each device keeps the responses that it holds.
        cut = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), rollout
        )
        looks = jax.lax.map(one, cut)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), looks)


def _make_loss(
    forward: _Forward,
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    beta: Array,
    is_first: Array,
    minibatch: Experience,
    ptx: Batch | None,
    ptx_loss: LossFn | None,
) -> LossFn:
    """Return the loss of parts of a minibatch, over the whole minibatch's counts: they add up."""
    tokens = jnp.maximum(jnp.sum(minibatch.mask), 1.0)
    sequences = jnp.maximum(jnp.sum(jnp.max(minibatch.mask, axis=1)), 1.0)
    policy_count = tokens if algorithm.aggregation == "token_mean" else sequences

    def loss_fn(params: dict, batch: dict[str, Any], key: Key[Array, ""]) -> tuple[Array, Metrics]:
        part: Experience = batch["experience"]
        rollout, looks, mask = part.rollout, part.looks, part.mask
        log_probs, entropy = forward.policy(params, rollout)
        # The policy that the first update begins with is the old one: its ratio is exactly 1.
        old = jnp.where(is_first, jax.lax.stop_gradient(log_probs), looks.log_probs)
        clips = dict(clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
        per_token, sums = clipped_policy_loss(log_probs, old, part.advantages, mask, **clips)
        logs = {name: total / tokens for name, total in sums.items()}
        logs["entropy"] = jnp.sum(entropy * mask) / tokens
        logs["policy_loss"] = aggregate(per_token, mask, algorithm.aggregation)[0] / policy_count
        objective = logs["policy_loss"] - algorithm.entropy_weight * logs["entropy"]
        if kl.place == "loss_k2":
            k2 = kl_k2_sequence(log_probs, looks.reference_log_probs, mask)
            objective += beta * jnp.sum(k2) / sequences
        if kl.place == "loss_k3":
            k3 = kl_k3(log_probs, looks.reference_log_probs)
            objective += beta * aggregate(k3, mask, algorithm.aggregation)[0] / policy_count
        if forward.models.value is not None:
            values = forward.values(params, rollout)
            per_token, value_sums = clipped_value_loss(
                values, looks.values, part.returns, mask, clip=algorithm.value_clip
            )
            logs |= {name: total / tokens for name, total in value_sums.items()}
            logs["value_loss"] = jnp.sum(per_token * mask) / tokens
            objective += algorithm.value_weight * logs["value_loss"]
        if ptx_loss is not None:
            total, _ = ptx_loss(params["policy"], batch["ptx"], key)
            logs["ptx_loss"] = total / jnp.maximum(jnp.sum(ptx["loss_weights"]), 1.0)
            objective += algorithm.ptx_weight * logs["ptx_loss"]
        return objective, jax.lax.stop_gradient(logs)

    return loss_fn


def _minibatch_rows(key: Key[Array, ""], num_rows: int, algorithm: AlgorithmConfig) -> Array:
    """Return the rows of each update: every epoch all of them once, in a fresh order."""
    keys = jax.random.split(key, algorithm.epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_rows))(keys)
    return orders.reshape(algorithm.epochs * algorithm.minibatches, -1)
