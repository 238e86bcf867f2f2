"""One pretraining step planned by formulas, and compiled for devices that are not here."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from configs.schema import PretrainConfig
from experiments.assembly import Training, assemble_pretraining
from llm.parallel.collectives import Collective, read_collectives
from llm.parallel.mesh import make_mesh
from llm.parallel.products import count_product_flops, kernel_calls
from llm.scaling.hardware import Slice
from llm.scaling.plan import Plan, make_plan
from llm.scaling.workload import Workload
from llm.training.ahead import (
    ChipMemory,
    abstract_batch,
    abstract_state,
    chip_memory,
    topology_devices,
)
from llm.training.state import TrainState


def workload_of(config: PretrainConfig) -> Workload:
    """Return what a pretraining step is made of, as plans count it."""
    return Workload(
        model=config.model,
        compute=config.compute,
        optimizer=config.optimizer,
        batch_sequences=config.data.batch_sequences,
        length_tokens=config.data.length_tokens,
        accumulate_steps=config.accumulate_steps,
        loss_tile_tokens=config.loss_tile_tokens,
    )


def planned(config: PretrainConfig, where: Slice) -> Plan:
    """Return the analytic plan of a pretraining step."""
    return make_plan(workload_of(config), config.mesh, where)


def compiled(config: PretrainConfig, where: Slice) -> "Compiled":
    """Return what the compiler says of a pretraining step.

    Raises:
      DoesNotFit: the devices' memory is too small.
      ValueError: libtpu is missing, or knows no such slice.
    """
    devices = topology_devices(where.topology, where.num_slices)
    return compile_step(*lower_pretraining(config, devices))


class Compiled(NamedTuple):
    """What the compiler says of a step, of one device."""

    memory: ChipMemory
    product_flops: float
    kernels: dict[str, int]  # Pallas kernels, and how often a step calls each
    collectives: list[Collective]
    seconds: float  # that compiling took


class DoesNotFit(ValueError):
    """The compiler found no room for a step in a device's memory."""


def compile_step(
    lowered: jax.stages.Lowered, mesh: Mesh, open_turns: int | None = None
) -> Compiled:
    """Compile a step and read what came of it; a loop that runs until something happens counts as
    running `open_turns` times.

    Raises:
      DoesNotFit: the devices' memory is too small; with the compiler's own figures.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(" ".join(str(error).split())[:300]) from error
    text = compiled.as_text()
    return Compiled(
        chip_memory(compiled),
        count_product_flops(text, open_turns),
        dict(kernel_calls(text, open_turns)),
        read_collectives(text, mesh, open_turns),
        time.perf_counter() - started,
    )


def lower_pretraining(
    config: PretrainConfig, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, Mesh]:
    """Return the training step of `experiments.pretrain`, lowered for the devices."""
    mesh = make_mesh(config.mesh, devices)
    training = assemble_pretraining(config, mesh)
    batch = abstract_batch(mesh, config.data.batch_sequences, config.data.length_tokens)
    return training.train_step.lower(state_of(training, mesh), batch), mesh


def state_of(training: Training, mesh: Mesh) -> TrainState:
    """Return the shapes of a training's state and where they lie."""
    model, optimizer = training.model, training.optimizer
    return abstract_state(model, optimizer, mesh, ema=training.ema, rates=training.rates)
