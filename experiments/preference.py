"""Improve a policy on human feedback without a reward model: DPO, IPO, KTO, ORPO or SimPO.

    python -m experiments.preference --config=configs/preference_tiny.py --workdir=runs/tiny_dpo

What the reference says of the responses is computed before each step; with an adapter it is the
policy without its factors and takes no memory.
"""

import dataclasses

import jax

from configs.schema import DirectPreferenceConfig
from experiments import entry
from experiments.assembly_preference import assemble_preference_training
from experiments.feedback import feedback_digests, load_comparisons
from experiments.loading import Start, load_model, load_start
from experiments.run_flags import PROFILE, start_processes
from experiments.workdir_flag import WORKDIR
from llm.data.comparisons import ComparisonBatches, spread
from llm.models.adapters import adapt_params
from llm.models.on_mesh import check_on_mesh
from llm.models.transformer import logical_axes, param_shapes
from llm.parallel.hosts import host_share, place_batch
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings
from llm.rl.models import Models
from llm.training.digests import tree_digest
from llm.training.preference_loss import make_reference_step
from llm.training.replay import replayed
from llm.training.run import Run
from llm.training.run_config import check_config
from llm.training.state import TrainState, averaged_params


def train_on_preferences(config: DirectPreferenceConfig, workdir: str) -> None:
    """Improve, or go on improving, the policy that the config starts from."""
    start = load_start(config.source, workdir, config.chat_template)
    fields = dataclasses.asdict(config) | {"model": dataclasses.asdict(start.config)}
    check_config(workdir, fields, allow_change=config.run.allow_config_change)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_on_mesh(start.config, config.compute, mesh)

    # Data
    pairs_only = config.preference.method != "kto"  # which learns from single thumbs, too
    encoded, told = load_comparisons(config, start.tokenizer, pairs_only=pairs_only)
    share = host_share(mesh)
    hosts = dict(host_index=share.index, host_count=share.count)
    batches = ComparisonBatches(encoded["train"], config.comparisons, **hosts)
    digests = feedback_digests(encoded, start.tokenizer)
    total_steps = config.num_steps(len(batches.records))

    # Model, loss, optimizer
    training = assemble_preference_training(config, start.config, mesh, total_steps)
    model, train_step = training.model, replayed(training.train_step, config.run.replay_every_steps)
    models = Models(model, None)
    tiles = dict(tile_tokens=config.loss_tile_tokens)
    add_reference = make_reference_step(model, models.reference, mesh, config.preference, **tiles)
    score = jax.jit(lambda params, batch: training.loss_fn(params, batch, None)[1])

    def evaluate(run: Run, state: TrainState, frozen: dict) -> None:
        if "validation" not in encoded:
            return
        totals: dict[str, float] = {}
        held_out = spread(encoded["validation"], config.comparisons.max_responses)
        for batch in ComparisonBatches(held_out, config.comparisons, one_pass=True, **hosts):
            params = averaged_params(state)
            reference = models.reference_params({"policy": state.params}, frozen)
            batch = add_reference(params, reference, batch)
            arrays = {name: x for name, x in batch.items() if name != "cursor"}
            sums = score(params, place_batch(arrays, mesh))
            totals = {n: totals.get(n, 0.0) + float(x) for n, x in sums.items()}
        write_evaluation(run, totals)

    # Run
    run = Run(
        workdir,
        fields,
        config.run,
        total_steps=total_steps,
        tokens_per_step=config.tokens_per_step,
        code=__file__,
    )
    with jax.set_mesh(mesh), run:
        for line in told:
            run.say(line)
        start.tokenizer.save(run.workdir / "tokenizer")
        base, frozen, source_digest = init_frozen(config, models, start, mesh)
        run.check_data(digests | source_digest)
        if base is not None:
            base = adapt_params(model, base, jax.random.key(config.seed))
        state = training.init_state(mesh, config.seed, params=base)

        # Restore
        state, batches = run.restore(state, batches)
        if run.due(config.evaluate_every_steps):
            evaluate(run, state, frozen)

        # Loop
        while run.step < run.total_steps:
            reference = models.reference_params({"policy": state.params}, frozen)
            batch = add_reference(state.params, reference, next(batches))
            state, metrics = train_step(state, batch)
            state = run.after_step(state, metrics)
            if run.due(config.evaluate_every_steps):
                evaluate(run, state, frozen)


def init_frozen(
    config: DirectPreferenceConfig, models: Models, start: Start, mesh
) -> tuple[dict | None, dict, dict[str, str]]:
    """Return (parameters that a fresh policy starts from, frozen ones, their digest): the
    reference, unless the method has none or it shares the policy's trunk."""
    base, frozen, digests = start.params(), {}, {}
    if config.preference.needs_reference and not models.shared:
        reference = load_model(config.source).params if base is None else base
        digests["source"] = tree_digest(reference)
        plain = models.reference
        placed = make_shardings(mesh, logical_axes(plain), param_shapes(plain))
        frozen["reference"] = jax.device_put(reference, placed)
    return base, frozen, digests


def write_evaluation(run: Run, totals: dict[str, float]) -> None:
    """Write held-out means to the run's logs."""
    count = max(totals.pop("prompts"), 1.0)
    means = {name: total / count for name, total in totals.items()}
    run.write_metrics({f"eval/{name}": value for name, value in means.items()})
    shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(means.items()))
    run.say(f"step {run.step}: held-out {shown}")


def main(config: DirectPreferenceConfig) -> None:
    start_processes(config)
    train_on_preferences(entry.profiled(config, PROFILE.value), WORKDIR.value)


if __name__ == "__main__":
    entry.run(main, DirectPreferenceConfig)
