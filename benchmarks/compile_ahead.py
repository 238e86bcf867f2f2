"""Compile a ladder's or a study's runs for a TPU slice, without a TPU: do they fit, how long?

    python -m benchmarks.compile_ahead --config=configs/scaling_tpu.py --topology=v5p:4x4x4
    python -m benchmarks.compile_ahead --job=emergence --config=configs/emergence_tpu.py

Needs libtpu beside JAX on CPU (extra [tpu]). The last line is one JSON object.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

_JOB = flags.DEFINE_enum("job", "scaling", ("scaling", "emergence"), "What the recipe is of.")
_CONFIG = flags.DEFINE_string("config", "configs/scaling_tpu.py", "A recipe.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "As v5e:4x4, v5p:4x4x4, v6e:8x8.")


class Program(NamedTuple):
    """A training step that is to be compiled. Those of one key are one program."""

    name: str
    key: Any
    params: int  # of one run
    runs: int
    lower: Callable[[], Any]


def main(_):
    from llm.training.ahead import topology_devices

    devices = topology_devices(_TOPOLOGY.value)
    columns = "{:36} {:>14} {:>5} {:>18} {:>8} {:>10}"
    print(columns.format("group", "params", "runs", "GB a chip", "kernels", "compiled"))
    rows, tried = [], {}
    programs = {"scaling": ladder_programs, "emergence": study_programs}[_JOB.value]
    for program in programs(devices):
        if program.key not in tried:
            tried[program.key] = measure(program)
        found = {"group": program.name, "params": program.params, "runs": program.runs}
        found |= tried[program.key]
        rows.append(found)
        cells = (
            found["group"],
            f"{found['params']:,}",
            found["runs"],
            f"{found['state_gb']:.2f} + {found['temporary_gb']:.2f}",
            found["kernels"],
            f"{found['compile_seconds']:.0f} s",
        )
        print(columns.format(*cells), flush=True)
    print(json.dumps({"topology": _TOPOLOGY.value, "chips": len(devices), "groups": rows}))


def measure(program: Program) -> dict:
    """Return a chip's memory and the compile time of a step."""
    from llm.training.ahead import chip_memory

    started = time.perf_counter()
    compiled = program.lower().compile()
    memory = chip_memory(compiled)
    return {
        "state_gb": memory.state / 1e9,
        "temporary_gb": memory.temporaries / 1e9,
        "kernels": compiled.as_text().count("tpu_custom_call"),
        "compile_seconds": time.perf_counter() - started,
    }


def ladder_programs(devices) -> Iterator[Program]:
    """Yield the step of each group of a ladder; lengths of one shape are one program."""
    from configs.command_line import load_config
    from configs.schema import ScalingConfig
    from experiments.ladder import groups_of
    from llm.scaling.accounting import num_params

    config = load_config(_CONFIG.value, [], ScalingConfig)
    for group in groups_of(config, config.data.tokenizer.vocab_size):
        runs = len(group.members)
        lower = lower_run if runs == 1 else lower_members
        key = group.model, group.optimizer.name, runs
        params = num_params(group.model)
        yield Program(
            group.name, key, params, runs, lambda g=group, lower=lower: lower(config, g, devices)
        )


def lower_run(config, group, devices):
    """Return the training step of a group's only run, lowered for the devices."""
    from experiments.ladder import recipe_of
    from llm.models.transformer import Transformer, logical_axes
    from llm.parallel.mesh import make_mesh
    from llm.training.ahead import abstract_batch, abstract_state
    from llm.training.loss import make_causal_lm_loss
    from llm.training.optimizers import make_optimizer
    from llm.training.schedules import make_schedule
    from llm.training.state import state_shardings
    from llm.training.step import make_train_step

    recipe = recipe_of(config, group, group.members[0])
    model, mesh = Transformer(recipe.model, recipe.compute), make_mesh(recipe.mesh, devices)
    optimizer = make_optimizer(
        recipe.optimizer, logical_axes(model), width_ratio=recipe.model.width_ratio
    )
    step = make_train_step(
        make_causal_lm_loss(
            model,
            z_loss=recipe.z_loss,
            tile_tokens=recipe.loss_tile_tokens,
            router_balance_weight=recipe.router_balance_weight,
            router_z_weight=recipe.router_z_weight,
        ),
        optimizer,
        recipe.optimizer,
        make_schedule(
            recipe.schedule, total_steps=recipe.num_steps, tokens_per_step=recipe.tokens_per_step
        ),
        state_shardings(model, optimizer, mesh),
        mesh,
        accumulate_steps=recipe.accumulate_steps,
    )
    batch = abstract_batch(mesh, recipe.data.batch_sequences, recipe.data.length_tokens)
    return step.lower(abstract_state(model, optimizer, mesh), batch)


def lower_members(config, group, devices):
    """Return the training step of a group's runs together, lowered for the devices."""
    import jax

    from experiments.ladder import recipe_of
    from experiments.members import member_runs
    from llm.training.ahead import batch_shapes
    from llm.training.members import members_mesh

    recipe = recipe_of(config, group, group.members[0])
    runs, mesh = member_runs(recipe, group.members), members_mesh(len(group.members), devices)
    rows = len({member.data_seed for member in group.members})
    shapes = batch_shapes(recipe.data.batch_sequences, recipe.data.length_tokens)
    stacked = {
        name: jax.ShapeDtypeStruct(((1 if rows == 1 else len(group.members)), *x.shape), x.dtype)
        for name, x in shapes.items()
    }
    return runs.make_step(mesh).lower(runs.abstract_state(mesh), stacked)


def study_programs(devices) -> Iterator[Program]:
    """Yield the step of each group of each phenomenon."""
    from configs.command_line import load_config
    from configs.schema import EmergenceConfig
    from experiments.emergence import studies
    from llm.training.members import members_mesh

    config = load_config(_CONFIG.value, [], EmergenceConfig)
    for phenomenon, (section, groups_of, _) in studies(config).items():
        for group in groups_of(section, config):
            mesh = members_mesh(len(group.members), devices)

            def lower(group=group, mesh=mesh, section=section):
                runs = group.runs(section)
                return runs.make_step(mesh).lower(runs.abstract_state(mesh), next(group.batches))

            name = f"{phenomenon}/{group.name}"
            params, runs = group.trainable.num_params, len(group.members)
            yield Program(name, name, params, runs, lower)


if __name__ == "__main__":
    app.run(main)
