"""The training steps that `experiments.plan` compiles for devices that are not here."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from configs.schema import EmergenceConfig, PretrainConfig, ScalingConfig
from experiments.emergence import studies
from experiments.ladder import groups_of, recipe_of
from experiments.members import member_runs
from llm.models.transformer import Transformer, logical_axes
from llm.parallel.collectives import Collective, read_collectives
from llm.parallel.mesh import make_mesh
from llm.parallel.products import count_product_flops, kernel_calls
from llm.scaling.accounting import num_params
from llm.training.ahead import ChipMemory, abstract_batch, abstract_state, batch_shapes, chip_memory
from llm.training.loss import make_causal_lm_loss
from llm.training.members import members_mesh
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import state_shardings
from llm.training.step import make_train_step


class Compiled(NamedTuple):
    """What the compiler says of a step, of one device."""

    memory: ChipMemory
    product_flops: float
    kernels: dict[str, int]  # Pallas kernels, and how often a step calls each
    collectives: list[Collective]
    seconds: float  # that compiling took


class DoesNotFit(ValueError):
    """The compiler found no room for a step in a device's memory."""


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh) -> Compiled:
    """Compile a step and read what came of it.

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
        count_product_flops(text),
        dict(kernel_calls(text)),
        read_collectives(text, mesh),
        time.perf_counter() - started,
    )


def lower_pretraining(
    config: PretrainConfig, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, Mesh]:
    """Return the training step of `experiments.pretrain`, lowered for the devices."""
    model, mesh = Transformer(config.model, config.compute), make_mesh(config.mesh, devices)
    ema = config.optimizer.ema_decay is not None
    optimizer = make_optimizer(
        config.optimizer, logical_axes(model), width_ratio=config.model.width_ratio
    )
    step = make_train_step(
        make_causal_lm_loss(model, z_loss=config.z_loss, tile_tokens=config.loss_tile_tokens),
        optimizer,
        config.optimizer,
        make_schedule(
            config.schedule, total_steps=config.num_steps, tokens_per_step=config.tokens_per_step
        ),
        state_shardings(model, optimizer, mesh, ema=ema),
        mesh,
        accumulate_steps=config.accumulate_steps,
    )
    batch = abstract_batch(mesh, config.data.batch_sequences, config.data.length_tokens)
    return step.lower(abstract_state(model, optimizer, mesh, ema=ema), batch), mesh


class Program(NamedTuple):
    """A step of a group of runs. Those of one key are one program."""

    name: str
    key: Any
    params: int  # of one run
    runs: int
    recipe: PretrainConfig | None  # of a group of one run, which is planned like any pretraining
    lower: Callable[[], tuple[jax.stages.Lowered, Mesh]]


def ladder_programs(config: ScalingConfig, devices: Sequence[jax.Device]) -> Iterator[Program]:
    """Yield the step of each group of each ladder; lengths of one shape are one program."""
    for group in groups_of(config, config.data.tokenizer.vocab_size):
        runs = len(group.members)
        recipe = recipe_of(config, group, group.members[0])

        def lower(group=group, recipe=recipe):
            if len(group.members) == 1:
                return lower_pretraining(recipe, devices)
            return _lower_members(recipe, group.members, devices)

        yield Program(
            group.name,
            (group.model, group.optimizer.name, runs),
            num_params(group.model),
            runs,
            recipe if runs == 1 else None,
            lower,
        )


def _lower_members(recipe: PretrainConfig, members, devices) -> tuple[jax.stages.Lowered, Mesh]:
    runs, mesh = member_runs(recipe, members), members_mesh(len(members), devices)
    rows = len({member.data_seed for member in members})
    shapes = batch_shapes(recipe.data.batch_sequences, recipe.data.length_tokens)
    stacked = {
        name: jax.ShapeDtypeStruct(((1 if rows == 1 else len(members)), *x.shape), x.dtype)
        for name, x in shapes.items()
    }
    return runs.make_step(mesh).lower(runs.abstract_state(mesh), stacked), mesh


def study_programs(config: EmergenceConfig, devices: Sequence[jax.Device]) -> Iterator[Program]:
    """Yield the step of each group of each phenomenon."""
    for phenomenon, (section, make_groups, _) in studies(config).items():
        for group in make_groups(section, config):
            mesh = members_mesh(len(group.members), devices)

            def lower(group=group, mesh=mesh, section=section):
                runs = group.runs(section)
                lowered = runs.make_step(mesh).lower(runs.abstract_state(mesh), next(group.batches))
                return lowered, mesh

            name = f"{phenomenon}/{group.name}"
            runs = len(group.members)
            yield Program(name, name, group.trainable.num_params, runs, None, lower)
