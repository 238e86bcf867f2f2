"""What a config of policy gradients trains, put together."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from configs.schema import RlhfConfig
from experiments.assembly import schedule_of
from llm.models.config import TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer
from llm.rl.learning import make_learn_step
from llm.rl.models import Models
from llm.rl.state import RlState, init_controllers, rl_shardings, with_controllers
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.state import ParamSpec, init_state, state_shardings
from llm.training.trainable import Rates, make_rates, split


class PolicyTraining(NamedTuple):
    """Policy, reference and value on a mesh, and what a step learns from scored responses."""

    models: Models
    spec: ParamSpec  # of what is trained
    optimizer: optax.GradientTransformation
    rates: Rates
    shardings: RlState
    learn: Any  # jitted, see make_learn_step

    def init_state(self, mesh: Mesh, seed: int, *, params: dict, kl_coefficient: float) -> RlState:
        """Return a fresh state on the mesh, with these parameters."""
        train = init_state(self.spec, self.optimizer, mesh, seed, params=params, rates=self.rates)
        controllers = init_controllers(kl_coefficient)
        return jax.device_put(with_controllers(train, controllers), self.shardings)


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
