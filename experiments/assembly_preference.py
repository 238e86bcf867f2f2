"""What a config of direct preference optimisation trains, put together."""

from jax.sharding import Mesh

from configs.schema import DirectPreferenceConfig
from experiments.assembly import Training, assemble, rates_of
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer
from llm.rl.models import Models
from llm.training.preference_loss import make_preference_loss


def assemble_preference_training(
    config: DirectPreferenceConfig, shape: TransformerConfig, mesh: Mesh, total_steps: int
) -> Training:
    """Return what trains on a mesh: a policy of that shape, checked there.

    Raises:
      ValueError: nothing would learn, or what a shared reference stands on would.
    """
    model = Transformer(shape, config.compute, config.adapter)
    rates = rates_of(config, shape, model)
    if config.preference.needs_reference:
        Models(model, None).check_rates({"policy": rates})
    loss_fn = make_preference_loss(model, config.preference, tile_tokens=config.loss_tile_tokens)
    return assemble(
        config, model, loss_fn, mesh, total_steps=total_steps, rates=rates, count="prompts"
    )
