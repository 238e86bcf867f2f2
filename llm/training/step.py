"""The jitted training step of every stage: (state, batch) → (state, metrics). Second floor."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llm.parallel.hosts import place_batch
from llm.training.config import OptimizerConfig
from llm.training.schedules import Schedule
from llm.training.state import TrainState
from llm.training.trainable import Rates, overlay, split

Batch = dict[str, Array]
Sums = dict[str, Float[Array, ""]]
# (params, batch, key) → the objective summed over the batch; sums to report, with what they count
LossFn = Callable[[dict, dict, Array], tuple[Float[Array, ""], Sums]]


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Learnt(NamedTuple):
    """What an update changes."""

    params: dict
    opt_state: Any
    ema_params: dict | None


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    schedule: Schedule,
    shardings: TrainState,
    mesh: Mesh,
    *,
    accumulate_steps: int = 1,
    rates: Rates | None = None,
    count: str = "tokens",
) -> "TrainStep":
    """Return the jitted step. It donates the state, and takes this host's slice of the batch.

    Each is a `make_step_fn` step at the config's learning rate.
    """
    step = make_step_fn(
        loss_fn,
        optimizer,
        config,
        schedule,
        accumulate_steps=accumulate_steps,
        rates=rates,
        count=count,
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        lambda state, batch: step(state, batch, config.learning_rate),
        donate_argnums=0,
        out_shardings=(shardings, replicated),
    )
    return TrainStep(jitted, mesh)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted step, called with this host's slice of the batch, or lowered with shapes."""

    jitted: Any
    mesh: Mesh

    def __call__(
        self, state: TrainState, batch: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        if self.mesh.size > 1:  # placing takes 2 ms or more: one device needs none
            batch = place_batch(batch, self.mesh)
        return self.jitted(state, batch)

    def lower(
        self, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]
    ) -> jax.stages.Lowered:
        """Lower for the mesh's devices, which need not be here."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch)


def make_step_fn(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    schedule: Schedule,
    *,
    accumulate_steps: int = 1,
    rates: Rates | None = None,
    count: str = "tokens",
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]]:
    """Return (state, batch, peak learning rate) → (state, metrics), pure and not yet jitted.

    Sums are divided by the one named `count`. A step whose loss or gradient is not finite leaves
    parameters, optimizer and EMA untouched and counts itself in `skipped_in_a_row`; one of padding
    alone leaves them too. The step number and the data cursor move on.
    """
    apply_gradients = make_apply_gradients(optimizer, config, rates)

    def step(state: TrainState, batch: Batch, peak_rate) -> tuple[TrainState, dict[str, Array]]:
        cursor = batch["cursor"]
        arrays = {name: x for name, x in batch.items() if name != "cursor"}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        trainable, frozen = split(state.params, rates)
        grads, objective, sums = accumulate(
            lambda part, *rest: loss_fn(overlay(frozen, part), *rest),
            trainable,
            arrays,
            key,
            accumulate_steps,
        )
        learning_rate = peak_rate * schedule(state.step)
        learnt = Learnt(trainable, state.opt_state, state.ema_params)
        learnt, norm, finite = apply_gradients(learnt, grads, sums[count], objective, learning_rate)
        skipped = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        total = jnp.maximum(sums[count], 1.0)
        metrics = {f"train/{k}": v / total for k, v in sums.items() if k != count}
        metrics |= {
            f"train/{count}": sums[count],
            "train/grad_norm": norm,
            "train/learning_rate": learning_rate,
            "train/skipped_in_a_row": skipped,
        }
        params = overlay(frozen, learnt.params)
        state = TrainState(
            state.step + 1, params, learnt.opt_state, learnt.ema_params, state.rng, cursor, skipped
        )
        return state, metrics

    return step


def make_apply_gradients(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, rates: Rates | None = None
) -> Callable[..., tuple[Learnt, Array, Array]]:
    """Return (learnt, summed gradients, count, objective, learning rate) → (learnt, norm, finite).

    Clips by the global norm of the mean gradient, and changes nothing unless objective and norm are
    finite and the count is positive: of nothing there is no gradient, but momentum and decay would
    move on.
    """

    def apply(learnt: Learnt, grads, count, objective, learning_rate):
        total = jnp.maximum(count, 1.0)
        factors = None if rates is None else split(rates, rates)[0]
        if factors is not None:  # layers frozen among stacked ones must not count in the norm
            grads = jax.tree.map(lambda g, r: jnp.where(np.asarray(r) > 0, g, 0), grads, factors)
        norm = optax.tree.norm(grads) / total
        scale = (
            1.0 if config.clip_norm is None else jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
        )
        grads = jax.tree.map(lambda g: g * (scale / total), grads)
        updates, opt_state = optimizer.update(grads, learnt.opt_state, learnt.params)
        if factors is not None:
            updates = jax.tree.map(lambda u, r: u * np.asarray(r, u.dtype), updates, factors)
        params = jax.tree.map(lambda p, u: p + learning_rate * u, learnt.params, updates)
        ema = _moving_average(learnt.ema_params, params, config.ema_decay)
        finite = jnp.isfinite(objective) & jnp.isfinite(norm)
        changes = finite & (count > 0)
        changed = jax.tree.map(
            lambda new, old: jnp.where(changes, new, old), Learnt(params, opt_state, ema), learnt
        )
        return changed, norm, finite

    return apply


def accumulate(loss_fn: LossFn, params: dict, batch: dict, key: Array, accumulate_steps: int):
    """Return gradients, objective and sums over microbatches, summed and not yet divided."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate_steps == 1:
        (objective, sums), grads = grad_fn(params, batch, key)
        return grads, objective, sums

    def cut(x):  # strided, so that each device keeps the sequences that it holds
        return jnp.moveaxis(x.reshape(-1, accumulate_steps, *x.shape[1:]), 1, 0)

    def body(total, microbatch):
        index, arrays = microbatch
        (objective, sums), grads = grad_fn(params, arrays, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (grads, objective, sums)), None

    micro = (jnp.arange(accumulate_steps), jax.tree.map(cut, batch))
    first = jax.tree.map(lambda x: x[0], micro)[1]
    (objective, sums), grads = jax.eval_shape(grad_fn, params, first, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, objective, sums))
    return jax.lax.scan(body, zero, micro)[0]


def _moving_average(ema, params, decay: float | None):
    if ema is None:
        return None
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
