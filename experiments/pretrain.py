"""Pretrain a causal language model.

    python -m experiments.pretrain --config=configs/pretrain_tiny.py --workdir=runs/tiny

Any field can be overridden (`--config.optimizer.learning_rate=3e-4`); started again with the same
workdir, a run goes on where it stopped.
"""

import dataclasses

import jax
from etils import epath

from configs.schema import PretrainConfig
from experiments import entry
from experiments.assembly import assemble_pretraining
from experiments.evaluation import make_evaluation
from experiments.run_flags import PROFILE, start_processes
from experiments.workdir_flag import WORKDIR
from llm.data.pipeline import data_digests, make_training_batches
from llm.data.prepare import prepare
from llm.data.tokenizer_training import make_tokenizer
from llm.parallel.hosts import host_share
from llm.parallel.mesh import make_mesh
from llm.scaling.accounting import training_flops_per_token
from llm.scaling.hardware import peak_flops
from llm.training.replay import replayed
from llm.training.run import Run
from llm.training.run_config import check_config


def pretrain(config: PretrainConfig, workdir: str) -> None:
    """Train, or go on training, the model of the config in the workdir."""
    fields = dataclasses.asdict(config)
    check_config(workdir, fields, allow_change=config.run.allow_config_change)  # before JAX starts

    # Model, loss, optimizer, on a mesh
    mesh = make_mesh(config.mesh)
    training = assemble_pretraining(config, mesh)
    train_step = replayed(training.train_step, config.run.replay_every_steps)

    # Data
    tokenizer = make_tokenizer(config.data)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    prepared = prepare(config.data, tokenizer)
    batches = make_training_batches(
        config.data,
        prepared,
        tokenizer,
        share=host_share(mesh),
        state_dir=epath.Path(workdir) / "data",
    )
    evaluate = make_evaluation(config, training.model, mesh, tokenizer, prepared.validation)

    # Run
    run = Run(
        workdir,
        fields,
        config.run,
        total_steps=config.num_steps,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=training_flops_per_token(config.model, config.data.length_tokens),
        peak_flops=peak_flops(jax.devices()),
        code=__file__,
        spikes=config.spikes,
    )
    with jax.set_mesh(mesh), run:
        run.check_data(data_digests(config.data, prepared, tokenizer))
        tokenizer.save(run.workdir / "tokenizer")
        state = training.init_state(mesh, config.seed, init_scale=config.init_scale)

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


def main(config: PretrainConfig) -> None:
    start_processes(config)
    pretrain(entry.profiled(config, PROFILE.value), WORKDIR.value)


if __name__ == "__main__":
    entry.run(main, PretrainConfig)
