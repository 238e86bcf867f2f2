"""Fine-tune a language model: instructions, or more text of a domain.

    python -m experiments.finetune --config=configs/finetune_smollm2.py --workdir=runs/chat

Starts from `source`: a workdir, a Hugging Face directory, a GGUF file, or SmolLM2's package. Of
conversations only what the assistant says is learnt; texts and conversations mix by weight. Full
fine-tuning, LoRA (`adapter.rank`) or QLoRA (`adapter.quantize`).
"""

import dataclasses

import jax
from etils import epath

from configs.schema import FinetuneConfig
from experiments import entry
from experiments.assembly import assemble_finetuning
from experiments.evaluation import make_evaluation
from experiments.loading import load_start
from experiments.run_flags import PROFILE, start_processes
from experiments.workdir_flag import WORKDIR
from llm.data.pipeline import data_digests, make_training_batches, num_truncated, rows_per_epoch
from llm.data.prepare import prepare
from llm.models.adapters import adapt_params
from llm.models.on_mesh import check_on_mesh
from llm.parallel.hosts import host_share
from llm.parallel.mesh import make_mesh
from llm.scaling.accounting import training_flops_per_token
from llm.scaling.hardware import peak_flops
from llm.training.replay import replayed
from llm.training.run import Run
from llm.training.run_config import check_config


def finetune(config: FinetuneConfig, workdir: str) -> None:
    """Train, or go on training, the model that the config starts from."""
    start = load_start(config.source, workdir, config.chat_template)
    model_config = dataclasses.replace(start.config, dropout_rate=config.dropout_rate)
    fields = dataclasses.asdict(config) | {"model": dataclasses.asdict(model_config)}
    check_config(workdir, fields, allow_change=config.run.allow_config_change)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_on_mesh(start.config, config.compute, mesh)

    # Data
    tokenizer = start.tokenizer
    prepared = prepare(config.data, tokenizer)
    batches = make_training_batches(
        config.data,
        prepared,
        tokenizer,
        share=host_share(mesh),
        state_dir=epath.Path(workdir) / "data",
    )
    total_steps = config.num_steps(rows_per_epoch(batches))

    # Model, loss, optimizer
    training = assemble_finetuning(config, model_config, mesh, total_steps)
    train_step = replayed(training.train_step, config.run.replay_every_steps)
    chat = any(source.format != "text" for source in config.data.sources.values())
    evaluate = make_evaluation(
        config, training.model, mesh, tokenizer, prepared.validation, chat=chat
    )

    # Run
    run = Run(
        workdir,
        fields,
        config.run,
        total_steps=total_steps,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=training_flops_per_token(model_config, config.data.length_tokens),
        peak_flops=peak_flops(jax.devices()),
        code=__file__,
        spikes=config.spikes,
    )
    with jax.set_mesh(mesh), run:
        run.check_data(data_digests(config.data, prepared, tokenizer))
        for name, cut in num_truncated(prepared.train, config.data.length_tokens).items():
            run.say(
                f"source {name}: {cut} of {prepared.train[name].num_documents} conversations are "
                f"longer than data.length_tokens={config.data.length_tokens}; their ends are cut"
            )
        tokenizer.save(run.workdir / "tokenizer")
        params = start.params()
        if params is not None:
            params = adapt_params(training.model, params, jax.random.key(config.seed))
        state = training.init_state(mesh, config.seed, params=params)

        # Restore
        state, batches = run.restore(state, batches)
        if run.due(config.evaluation.every_steps) or (config.evaluation.at_start and run.step == 0):
            evaluate(run, state)

        # Loop
        while run.step < run.total_steps:
            batch = next(batches)
            state, metrics = train_step(state, batch)
            state = run.after_step(state, metrics)
            if run.due(config.evaluation.every_steps):
                evaluate(run, state)
    batches.close()


def main(config: FinetuneConfig) -> None:
    start_processes(config)
    finetune(entry.profiled(config, PROFILE.value), WORKDIR.value)


if __name__ == "__main__":
    entry.run(main, FinetuneConfig)
