"""One step's learning: scored responses in, policy and value updated. Third floor."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from llm.rl.config import AlgorithmConfig, KLConfig, RolloutConfig
from llm.rl.experience import Looks, Metrics, make_experience
from llm.rl.forward import Forward, Said, in_parts
from llm.rl.loss import minibatch_loss
from llm.rl.models import Models
from llm.rl.rollout import Rollout, divides_prompts
from llm.rl.state import RlState
from llm.training.config import OptimizerConfig
from llm.training.schedules import Schedule
from llm.training.step import Batch, Learnt, LossFn, accumulate, make_apply_gradients
from llm.training.trainable import Rates, overlay, split


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
    that were dealt; the ptx batch is None without a `ptx_loss`. An update in which every token is
    masked changes nothing.

    Raises:
      ValueError: what a shared reference stands on would learn.
    """
    models.check_rates(rates)
    apply_gradients = make_apply_gradients(optimizer, optimizer_config, rates)
    num_updates = algorithm.epochs * algorithm.minibatches
    # A single update of the whole learns from the very pass that looks at the responses.
    looks_once = num_updates == 1 and accumulate_steps == 1
    group = rollout_config.group if looks_once and _shares_prompts(rollout_config, mesh) else 1
    forward = Forward(models, rollout_config.temperature, tile_tokens, group)

    def learn(state: RlState, frozen: dict, rollout: Rollout, scores, cursor, ptx: Batch | None):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        key = jax.random.fold_in(key, 1)  # 0 is the rollout's
        trainable, still = split(state.params, rates)
        learning_rate = optimizer_config.learning_rate * schedule(state.step)
        beta = state.controllers.kl_coefficient

        def experience_of(said: Said, reference):
            looks = Looks(said.log_probs, reference, said.values)
            return make_experience(
                rollout, looks, scores, state.controllers, algorithm, kl, rollout_config.group
            )

        def descend(learnt: Learnt, loss_fn: LossFn, batch: dict[str, Any], number):
            grads, objective, (logs, rest) = accumulate(
                lambda part, *rest: loss_fn(overlay(still, part), *rest),
                learnt.params,
                batch,
                jax.random.fold_in(key, number),
                accumulate_steps,
            )
            # The loss is a mean already: of a count, only whether there is any is told.
            counted = jnp.minimum(logs.pop("learnt_tokens"), 1.0)
            new, norm, finite = apply_gradients(learnt, grads, counted, objective, learning_rate)
            logs |= {"grad_norm": norm, "finite": finite, "done": counted > 0}
            return new, logs, rest

        def mixed(loss, logs: Metrics, params: dict, batch: dict, whole: dict, key):
            """Add the language-model loss of the ptx batch, where there is one."""
            if ptx_loss is None:
                return loss, logs
            total, _ = ptx_loss(params["policy"], batch["ptx"], key)
            total /= jnp.maximum(jnp.sum(whole["ptx"]["loss_weights"]), 1.0)
            learnt_tokens = logs["learnt_tokens"] + jnp.sum(batch["ptx"]["loss_weights"])
            logs |= {"ptx_loss": total, "learnt_tokens": learnt_tokens}
            return loss + algorithm.ptx_weight * total, logs

        def learn_once(learnt: Learnt):
            reference = forward.reference(state.params, frozen, rollout)
            whole = {"rollout": rollout} | ({} if ptx is None else {"ptx": ptx})

            def loss_fn(params, batch, key):
                said = forward(params, batch["rollout"])
                made = experience_of(jax.lax.stop_gradient(said), reference)
                experience = made[0]
                loss, logs = minibatch_loss(
                    said, experience, experience.mask, algorithm, kl, beta, is_first=True
                )
                loss, logs = mixed(loss, logs, params, batch, whole, key)
                return loss, jax.lax.stop_gradient((logs, made[1:]))

            learnt, logs, (controllers, metrics) = descend(learnt, loss_fn, whole, 0)
            return learnt, controllers, metrics, jax.tree.map(lambda x: x[None], logs)

        def learn_often(learnt: Learnt):
            said, reference = in_parts(
                lambda part: (
                    forward(state.params, part),
                    forward.reference(state.params, frozen, part),
                ),
                rollout,
                algorithm.minibatches,
            )
            experience, controllers, metrics = experience_of(said, reference)

            def update(carry, step):
                learnt, stopped = carry
                number, rows, ptx_rows = step
                whole = {"experience": jax.tree.map(lambda x: x[rows], experience)}
                if ptx is not None:
                    whole["ptx"] = jax.tree.map(lambda x: x[ptx_rows], ptx)

                def loss_fn(params, batch, key):
                    part = batch["experience"]
                    loss, logs = minibatch_loss(
                        forward(params, part.rollout),
                        part,
                        whole["experience"].mask,
                        algorithm,
                        kl,
                        beta,
                        is_first=number == 0,
                    )
                    loss, logs = mixed(loss, logs, params, batch, whole, key)
                    return loss, jax.lax.stop_gradient((logs, ()))

                new, logs, _ = descend(learnt, loss_fn, whole, number)
                if algorithm.stop_kl is not None:
                    stopped = stopped | (logs["approx_kl"] > algorithm.stop_kl)
                new = jax.tree.map(lambda a, b: jnp.where(stopped, b, a), new, learnt)
                logs["done"] &= ~stopped
                return (new, stopped), logs

            rows = _minibatch_rows(key, rollout.mask.shape[0], algorithm)
            num_ptx = 0 if ptx is None else ptx["tokens"].shape[0]
            ptx_rows = jnp.arange(num_ptx).reshape(algorithm.minibatches, -1)
            steps = (jnp.arange(num_updates), rows, jnp.tile(ptx_rows, (algorithm.epochs, 1)))
            (learnt, _), logs = jax.lax.scan(update, (learnt, jnp.asarray(False)), steps)
            return learnt, controllers, metrics, logs

        start = Learnt(trainable, state.opt_state, state.ema_params)
        learnt, controllers, metrics, logs = (learn_once if looks_once else learn_often)(start)
        done, finite = logs.pop("done"), logs.pop("finite")
        skipped = jnp.where(jnp.all(finite | ~done), 0, state.skipped_in_a_row + 1)
        updates = jnp.sum(done)
        metrics |= {
            f"rl/{name}": jnp.sum(jnp.where(done, x, 0.0)) / jnp.maximum(updates, 1)
            for name, x in logs.items()
        }
        metrics |= {
            "rl/updates": updates,
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


def _shares_prompts(config: RolloutConfig, mesh: Mesh) -> bool:
    """Return whether learning reads a prompt once for its group, as sampling does.

    On CPUs alone: elsewhere rows are long and go whole to a fused attention kernel, which keys that
    a group shares would do without.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return on_cpu and divides_prompts(mesh, config.prompts)


def _minibatch_rows(key: Key[Array, ""], num_rows: int, algorithm: AlgorithmConfig) -> Array:
    """Return the rows of each update: every epoch all of them once, in a fresh order."""
    keys = jax.random.split(key, algorithm.epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_rows))(keys)
    return orders.reshape(algorithm.epochs * algorithm.minibatches, -1)
