"""Compile the runs of a ladder for a TPU slice, without a TPU: do they fit, how long does it take?

    python -m benchmarks.compile_ahead --config=configs/scaling_tpu.py --topology=v5p:4x4x4

Needs libtpu beside JAX on CPU (extra [tpu]). The last line is one JSON object.
"""

import json
import os
import time

from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

_CONFIG = flags.DEFINE_string("config", "configs/scaling_tpu.py", "A recipe of a ladder.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "As v5e:4x4, v5p:4x4x4, v6e:8x8.")


def main(_):
    from configs.command_line import load_config
    from configs.schema import ScalingConfig
    from experiments.ladder import groups_of
    from llm.training.ahead import topology_devices

    config = load_config(_CONFIG.value, [], ScalingConfig)
    devices = topology_devices(_TOPOLOGY.value)
    columns = "{:36} {:>14} {:>8} {:>18} {:>8} {:>10}"
    print(columns.format("group", "params", "steps", "GB a chip", "kernels", "compiled"))
    rows, tried = [], {}
    for group in groups_of(config, config.data.tokenizer.vocab_size):
        if group.model not in tried:  # lengths of one shape are one program
            tried[group.model] = measure(config, group, devices)
        found = {"group": group.name, "steps": group.num_steps} | tried[group.model]
        rows.append(found)
        cells = (
            group.name,
            f"{found['params']:,}",
            f"{group.num_steps:,}",
            f"{found['state_gb']:.2f} + {found['temporary_gb']:.2f}",
            found["kernels"],
            f"{found['compile_seconds']:.0f} s",
        )
        print(columns.format(*cells), flush=True)
    print(json.dumps({"topology": _TOPOLOGY.value, "chips": len(devices), "groups": rows}))


def measure(config, group, devices) -> dict:
    """Return a chip's memory and the compile time of a group's step."""
    from llm.scaling.accounting import num_params
    from llm.training.ahead import chip_memory

    started = time.perf_counter()
    compiled = lower(config, group, devices).compile()
    memory = chip_memory(compiled)
    return {
        "params": num_params(group.model),
        "state_gb": memory.state / 1e9,
        "temporary_gb": memory.temporaries / 1e9,
        "kernels": compiled.as_text().count("tpu_custom_call"),
        "compile_seconds": time.perf_counter() - started,
    }


def lower(config, group, devices):
    """Return a group's training step, lowered for the devices."""
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
        make_causal_lm_loss(model, z_loss=recipe.z_loss, tile_tokens=recipe.loss_tile_tokens),
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


if __name__ == "__main__":
    app.run(main)
