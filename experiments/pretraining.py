"""What a pretraining config trains, put together: for runs, for many of them at once, for plans."""

from typing import NamedTuple

import optax
from jax.sharding import Mesh

from configs.schema import PretrainConfig
from llm.models.on_mesh import check_on_mesh
from llm.models.transformer import Transformer, logical_axes
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import Schedule, make_schedule
from llm.training.state import state_shardings
from llm.training.step import LossFn, TrainStep, make_train_step


class Pretraining(NamedTuple):
    """A model on a mesh, what updates its parameters, and a step of both."""

    model: Transformer
    optimizer: optax.GradientTransformation
    ema: bool  # whether an average of the parameters is kept
    train_step: TrainStep


def assemble(config: PretrainConfig, mesh: Mesh) -> Pretraining:
    """Return what trains on a mesh, whose devices need not be here.

    Raises:
      ValueError: the model cannot run on the mesh.
    """
    check_on_mesh(config.model, config.compute, mesh)
    model = Transformer(config.model, config.compute)
    optimizer = make_optimizer(
        config.optimizer, logical_axes(model), width_ratio=config.model.width_ratio
    )
    ema = config.optimizer.ema_decay is not None
    train_step = make_train_step(
        loss_of(config, model),
        optimizer,
        config.optimizer,
        schedule_of(config),
        state_shardings(model, optimizer, mesh, ema=ema),
        mesh,
        accumulate_steps=config.accumulate_steps,
    )
    return Pretraining(model, optimizer, ema, train_step)


def loss_of(config: PretrainConfig, model: Transformer) -> LossFn:
    """Return the loss that the config asks for."""
    return make_causal_lm_loss(
        model,
        z_loss=config.z_loss,
        tile_tokens=config.loss_tile_tokens,
        router_balance_weight=config.router_balance_weight,
        router_z_weight=config.router_z_weight,
    )


def schedule_of(config: PretrainConfig) -> Schedule:
    """Return the learning rate by step."""
    return make_schedule(
        config.schedule, total_steps=config.num_steps, tokens_per_step=config.tokens_per_step
    )
