"""The steps of ladders and studies, which `experiments.plan` compiles group by group."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from configs.schema import EmergenceConfig, PretrainConfig, ScalingConfig
from experiments.emergence import studies
from experiments.ladder import groups_of, recipe_of
from experiments.members import member_runs
from experiments.plan_step import lower_pretraining
from llm.scaling.accounting import num_params
from llm.training.ahead import batch_shapes
from llm.training.members import members_mesh


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
