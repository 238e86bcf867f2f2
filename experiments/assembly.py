"""What a config trains, put together: for runs, for many of them at once, for plans."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from configs.schema import (
    DirectPreferenceConfig,
    FinetuneConfig,
    PretrainConfig,
    RewardModelConfig,
    RlhfConfig,
    TrainingConfig,
)
from llm.models.config import TransformerConfig
from llm.models.on_mesh import check_on_mesh
from llm.models.scalar import ScalarModel
from llm.models.transformer import Model, Transformer, logical_axes, param_shapes
from llm.rl.learning import make_learn_step
from llm.rl.models import Models
from llm.rl.state import RlState, init_controllers, rl_shardings, with_controllers
from llm.training.ahead import abstract_state, placed
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.preference_loss import make_preference_loss, make_reward_loss
from llm.training.schedules import Schedule, make_schedule
from llm.training.state import ParamSpec, TrainState, init_state, state_shardings
from llm.training.step import LossFn, TrainStep, make_train_step
from llm.training.trainable import Rates, make_rates, split


class Training(NamedTuple):
    """A model on a mesh, what updates its parameters, and a step of both."""

    model: Model
    optimizer: optax.GradientTransformation
    rates: Rates | None  # None: all parameters learn alike
    ema: bool  # whether an average of the parameters is kept
    train_step: TrainStep

    def init_state(self, mesh: Mesh, seed: int, **options) -> TrainState:
        """Return a fresh state on the mesh; see llm.training.state."""
        kept = dict(ema=self.ema, rates=self.rates)
        return init_state(self.model, self.optimizer, mesh, seed, **kept, **options)

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """Return the shapes of a state and where they lie."""
        kept = dict(ema=self.ema, rates=self.rates)
        return abstract_state(self.model, self.optimizer, mesh, **kept)


def assemble_pretraining(config: PretrainConfig, mesh: Mesh) -> Training:
    """Return what trains on a mesh, whose devices need not be here.

    Raises:
      ValueError: the model cannot run on the mesh.
    """
    check_on_mesh(config.model, config.compute, mesh)
    model = Transformer(config.model, config.compute)
    loss_fn = causal_lm_loss(config, model)
    return _assemble(config, model, loss_fn, mesh, schedule_of(config), rates=None)


def assemble_finetuning(
    config: FinetuneConfig, shape: TransformerConfig, mesh: Mesh, total_steps: int
) -> Training:
    """Return the same of fine-tuning a model of that shape, which has been checked on the mesh.

    Raises:
      ValueError: nothing of it would learn.
    """
    model = Transformer(shape, config.compute, config.adapter)
    rates = make_rates(
        config.trainable, shape, param_shapes(model), adapted=config.adapter.rank > 0
    )
    loss_fn = causal_lm_loss(config, model)
    return _assemble(config, model, loss_fn, mesh, schedule_of(config, total_steps), rates=rates)


def assemble_reward_training(
    config: RewardModelConfig, shape: TransformerConfig, mesh: Mesh, total_steps: int
) -> Training:
    """Return the same of a reward model on a trunk of that shape."""
    model = ScalarModel(shape, config.compute, config.adapter)
    rates = make_rates(
        config.trainable, shape, param_shapes(model), adapted=config.adapter.rank > 0
    )
    loss_fn = make_reward_loss(model, tie_threshold=config.tie_threshold)
    schedule = schedule_of(config, total_steps)
    return _assemble(config, model, loss_fn, mesh, schedule, rates=rates, count="prompts")


def assemble_preference_training(
    config: DirectPreferenceConfig, shape: TransformerConfig, mesh: Mesh, total_steps: int
) -> Training:
    """Return the same of a policy that learns from preferences.

    Raises:
      ValueError: nothing would learn, or what a shared reference stands on would.
    """
    models = Models(Transformer(shape, config.compute, config.adapter), None)
    model = models.policy
    rates = make_rates(config.trainable, shape, param_shapes(model), adapted=models.shared)
    if config.preference.needs_reference:
        models.check_rates({"policy": rates})
    loss_fn = make_preference_loss(model, config.preference, tile_tokens=config.loss_tile_tokens)
    schedule = schedule_of(config, total_steps)
    return _assemble(config, model, loss_fn, mesh, schedule, rates=rates, count="prompts")


class PolicyTraining(NamedTuple):
    """Policy, reference and value on a mesh, and what a step learns from scored responses."""

    models: Models
    spec: ParamSpec  # of what is trained
    optimizer: optax.GradientTransformation
    rates: Rates
    shardings: RlState
    learn: Any  # jitted, see make_learn_step

    def init_state(self, mesh: Mesh, config: RlhfConfig, params: dict) -> RlState:
        """Return a fresh state on the mesh."""
        train = init_state(
            self.spec, self.optimizer, mesh, config.seed, params=params, rates=self.rates
        )
        controllers = init_controllers(config.kl.coefficient)
        return jax.device_put(with_controllers(train, controllers), self.shardings)

    def abstract_state(self, mesh: Mesh) -> RlState:
        """Return the shapes of a state and where they lie."""
        train = abstract_state(self.spec, self.optimizer, mesh, rates=self.rates)
        state = with_controllers(train, jax.eval_shape(functools.partial(init_controllers, 0.0)))
        return jax.tree.map(placed, state, self.shardings)


def assemble_rlhf(config: RlhfConfig, shape: TransformerConfig, mesh: Mesh) -> PolicyTraining:
    """Return what learns by policy gradients on a mesh, whose devices need not be here.

    Raises:
      ValueError: nothing would learn, or what a shared reference stands on would.
    """
    policy = Transformer(shape, config.compute, config.adapter)
    has_value = config.algorithm.name == "ppo"  # all models compute alike
    value = ScalarModel(shape, config.compute, config.adapter) if has_value else None
    models = Models(policy, value)
    spec = models.spec()
    rates = make_rates(config.trainable, shape, spec.shapes, adapted=models.shared)
    optimizer = make_optimizer(
        config.optimizer, split(spec.axes, rates)[0], width_ratio=shape.width_ratio
    )
    shardings = rl_shardings(state_shardings(spec, optimizer, mesh, rates=rates), mesh)
    tiles = dict(tile_tokens=config.loss_tile_tokens)
    learn = make_learn_step(
        models,
        config.algorithm,
        config.kl,
        config.rollout,
        optimizer,
        config.optimizer,
        schedule_of(config, config.total_steps),
        shardings,
        mesh,
        rates=rates,
        ptx_loss=make_causal_lm_loss(policy, **tiles) if config.algorithm.ptx_weight else None,
        accumulate_steps=config.accumulate_steps,
        **tiles,
    )
    return PolicyTraining(models, spec, optimizer, rates, shardings, learn)


def causal_lm_loss(config: TrainingConfig, model: Transformer) -> LossFn:
    """Return the loss on text that the config asks for."""
    return make_causal_lm_loss(
        model,
        z_loss=config.z_loss,
        tile_tokens=config.loss_tile_tokens,
        router_balance_weight=config.router_balance_weight,
        router_z_weight=config.router_z_weight,
    )


def schedule_of(config: Any, total_steps: int | None = None) -> Schedule:
    """Return the learning rate by step; a pretraining config knows its own number of steps."""
    total_steps = config.num_steps if total_steps is None else total_steps
    return make_schedule(
        config.schedule, total_steps=total_steps, tokens_per_step=config.tokens_per_step
    )


def _assemble(
    config: Any,
    model: Model,
    loss_fn: LossFn,
    mesh: Mesh,
    schedule: Schedule,
    *,
    rates: Rates | None,
    count: str = "tokens",
) -> Training:
    axes = split(logical_axes(model), rates)[0]
    optimizer = make_optimizer(config.optimizer, axes, width_ratio=model.config.width_ratio)
    ema = config.optimizer.ema_decay is not None
    train_step = make_train_step(
        loss_fn,
        optimizer,
        config.optimizer,
        schedule,
        state_shardings(model, optimizer, mesh, ema=ema, rates=rates),
        mesh,
        accumulate_steps=config.accumulate_steps,
        rates=rates,
        count=count,
    )
    return Training(model, optimizer, rates, ema, train_step)
