"""What a reward model's config trains, put together."""

from jax.sharding import Mesh

from configs.schema import RewardModelConfig
from experiments.assembly import Training, assemble, rates_of
from llm.models.config import TransformerConfig
from llm.models.scalar import ScalarModel
from llm.training.preference_loss import make_reward_loss


def assemble_reward_training(
    config: RewardModelConfig, shape: TransformerConfig, mesh: Mesh, total_steps: int
) -> Training:
    """Return what trains on a mesh: a trunk of that shape, checked there, under a scalar head.

    Raises:
      ValueError: nothing of it would learn.
    """
    model = ScalarModel(shape, config.compute, config.adapter)
    rates = rates_of(config, shape, model)
    loss_fn = make_reward_loss(model, tie_threshold=config.tie_threshold)
    return assemble(
        config, model, loss_fn, mesh, total_steps=total_steps, rates=rates, count="prompts"
    )
