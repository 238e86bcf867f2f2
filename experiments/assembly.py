"""What a config trains, put together: for runs, for many of them at once, for plans.

The stages after fine-tuning have modules of their own (assembly_reward and so on): a run notes the
code that it imports, and is not to be disturbed by what another stage alone computes.
"""

from typing import NamedTuple

import optax
from jax.sharding import Mesh

from configs.schema import (
    ComparisonStageConfig,
    FinetuneConfig,
    PretrainConfig,
    RlhfConfig,
    TrainingConfig,
)
from llm.models.config import TransformerConfig
from llm.models.on_mesh import check_on_mesh
from llm.models.transformer import Model, Transformer, logical_axes, param_shapes
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import Schedule, make_schedule
from llm.training.state import TrainState, init_state, state_shardings
from llm.training.step import LossFn, TrainStep, make_train_step
from llm.training.trainable import Rates, make_rates, split


class Training(NamedTuple):
    """A model on a mesh, what updates its parameters, and a step of both."""

    model: Model
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    rates: Rates | None  # None: all parameters learn alike
    ema: bool  # whether an average of the parameters is kept
    train_step: TrainStep

    def init_state(self, mesh: Mesh, seed: int, **options) -> TrainState:
        """Return a fresh state on the mesh; see llm.training.state."""
        kept = dict(ema=self.ema, rates=self.rates)
        return init_state(self.model, self.optimizer, mesh, seed, **kept, **options)


def assemble_pretraining(config: PretrainConfig, mesh: Mesh) -> Training:
    """Return what trains on a mesh, whose devices need not be here.

    Raises:
      ValueError: the model cannot run on the mesh.
    """
    check_on_mesh(config.model, config.compute, mesh)
    model = Transformer(config.model, config.compute)
    loss_fn = causal_lm_loss(config, model)
    return assemble(config, model, loss_fn, mesh, total_steps=config.num_steps)


def assemble_finetuning(
    config: FinetuneConfig, shape: TransformerConfig, mesh: Mesh, total_steps: int
) -> Training:
    """Return the same of fine-tuning a model of that shape, which has been checked on the mesh.

    Raises:
      ValueError: nothing of it would learn.
    """
    model = Transformer(shape, config.compute, config.adapter)
    rates = rates_of(config, shape, model)
    loss_fn = causal_lm_loss(config, model)
    return assemble(config, model, loss_fn, mesh, total_steps=total_steps, rates=rates)


def assemble(
    config: TrainingConfig | ComparisonStageConfig,
    model: Model,
    loss_fn: LossFn,
    mesh: Mesh,
    *,
    total_steps: int,
    rates: Rates | None = None,
    count: str = "tokens",
) -> Training:
    """Return a model and its loss with the optimizer, schedule and step that the config asks for;
    the loss is divided by the sum named `count`."""
    axes = split(logical_axes(model), rates)[0]
    optimizer = make_optimizer(config.optimizer, axes, width_ratio=model.config.width_ratio)
    ema = config.optimizer.ema_decay is not None
    train_step = make_train_step(
        loss_fn,
        optimizer,
        config.optimizer,
        schedule_of(config, total_steps),
        state_shardings(model, optimizer, mesh, ema=ema, rates=rates),
        mesh,
        accumulate_steps=config.accumulate_steps,
        rates=rates,
        count=count,
    )
    return Training(model, loss_fn, optimizer, rates, ema, train_step)


def rates_of(
    config: FinetuneConfig | ComparisonStageConfig, shape: TransformerConfig, model: Model
) -> Rates:
    """Return which parameters the config lets learn, and how fast."""
    adapted = config.adapter.rank > 0
    return make_rates(config.trainable, shape, param_shapes(model), adapted=adapted)


def causal_lm_loss(config: TrainingConfig, model: Transformer) -> LossFn:
    """Return the loss on text that the config asks for."""
    return make_causal_lm_loss(
        model,
        z_loss=config.z_loss,
        tile_tokens=config.loss_tile_tokens,
        router_balance_weight=config.router_balance_weight,
        router_z_weight=config.router_z_weight,
    )


def schedule_of(
    config: TrainingConfig | ComparisonStageConfig | RlhfConfig, total_steps: int
) -> Schedule:
    """Return the learning rate by step."""
    return make_schedule(
        config.schedule, total_steps=total_steps, tokens_per_step=config.tokens_per_step
    )
