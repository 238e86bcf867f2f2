"""Everything a policy-gradient run must keep to go on bitwise. Third floor."""

import dataclasses
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llm.rl.advantages import RunningScale, init_running_scale
from llm.training.state import TrainState


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class Controllers:
    """What is steered from step to step."""

    kl_coefficient: Float[Array, ""]
    scale: RunningScale  # of scores
    baseline: Float[Array, ""]  # REINFORCE's moving average of scores
    responses: Float[Array, ""]  # seen so far


@no_type_check
@flax.struct.dataclass
class RlState(TrainState):
    """A training state whose parameters are by model ("policy", "value"); its cursor counts the
    prompts that were dealt."""

    controllers: Controllers


def init_controllers(kl_coefficient: float) -> Controllers:
    return Controllers(
        kl_coefficient=jnp.float32(kl_coefficient),
        scale=init_running_scale(),
        baseline=jnp.float32(0.0),
        responses=jnp.float32(0.0),
    )


def with_controllers(train: TrainState, controllers: Controllers) -> RlState:
    """Return a training state with controllers; or their shardings, of shardings."""
    fields = {field.name: getattr(train, field.name) for field in dataclasses.fields(train)}
    return RlState(**fields, controllers=controllers)


def rl_shardings(train: TrainState, mesh: Mesh) -> RlState:
    """Return the shardings of a state: the controllers are replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return with_controllers(train, jax.tree.map(lambda _: replicated, init_controllers(0.0)))
