"""Pretrain several runs of one shape together: the loop of a group in a ladder."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from configs.schema import PretrainConfig
from experiments.assembly import causal_lm_loss, schedule_of
from llm.data.loader import Batch, Batches
from llm.data.pipeline import data_digests, make_training_batches
from llm.data.prepare import Prepared, prepare
from llm.data.prepared import PreparedSplit
from llm.data.tokenizer_training import make_tokenizer
from llm.data.tokenizers import Tokenizer
from llm.evaluation.language_modeling import make_stacked_score_step, score_splits
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.scaling.accounting import training_flops_per_token
from llm.training.members import Member, MemberRuns, members_mesh
from llm.training.replay import replayed
from llm.training.run import Run
from llm.training.state import TrainState, averaged_params


def pretrain_members(
    config: PretrainConfig, members: Sequence[Member], workdir: epath.PathLike
) -> None:
    """Train, or go on training, a run of the config for each member.

    A member's numbers take the place of the config's. Its metrics are those of its single run
    under the name member_{i}/….
    """
    model = Transformer(config.model, config.compute)
    tokenizer = make_tokenizer(config.data)
    prepared = prepare(config.data, tokenizer)
    run = Run(
        workdir,
        dataclasses.asdict(config) | {"members": [dataclasses.asdict(m) for m in members]},
        config.run,
        total_steps=config.num_steps,
        tokens_per_step=config.tokens_per_step * len(members),
        flops_per_token=training_flops_per_token(config.model, config.data.length_tokens),
        code=__file__,
    )
    tokenizer.save(run.workdir / "tokenizer")
    train_members(
        run,
        member_runs(config, members),
        MemberBatches(config, members, prepared, tokenizer),
        make_members_evaluation(config, model, len(members), prepared.validation),
        evaluate_every_steps=config.evaluation.every_steps,
        digests=data_digests(config.data, prepared, tokenizer),
    )


def member_runs(config: PretrainConfig, members: Sequence[Member]) -> MemberRuns:
    """Return the pretraining runs of the config that differ as the members do."""
    model = Transformer(config.model, config.compute)
    return MemberRuns(
        members,
        functools.partial(init_params, model),
        logical_axes(model),
        causal_lm_loss(config, model),
        config.optimizer,
        schedule_of(config, config.num_steps),
        config.model.width_ratio,
        config.accumulate_steps,
    )


def train_members(
    run: Run,
    runs: MemberRuns,
    batches: Any,
    evaluate: Callable[[Run, TrainState], None],
    *,
    evaluate_every_steps: int,
    digests: Mapping[str, str] | None = None,
) -> TrainState:
    """Train members of any model to the end of the run; return their stacked state.

    A member whose gradient is not finite is left where it was, and the run gives up when all are.
    `digests` are those of the data that are read, for `Run.check_data`.
    """
    mesh = members_mesh(len(runs.members))
    train_step = replayed(runs.make_step(mesh), run.run_config.replay_every_steps)
    with run:
        run.check_data(digests or {})
        state = runs.init_state(mesh)

        # Restore
        state, batches = run.restore(state, batches)
        if run.due(evaluate_every_steps) or run.step == 0:
            evaluate(run, state)

        # Loop
        while run.step < run.total_steps:
            batch = next(batches)
            state, metrics = train_step(state, batch)
            state = run.after_step(state, by_member(metrics))
            if run.due(evaluate_every_steps):
                evaluate(run, state)
    batches.close()
    return state


class MemberBatches(Iterator[Batch]):
    """The batches of all members: [R B T], or [1 B T] where all read the same."""

    def __init__(
        self,
        config: PretrainConfig,
        members: Sequence[Member],
        prepared: Prepared,
        tokenizer: Tokenizer,
    ):
        seeds = sorted({member.data_seed for member in members})
        self._order = [seeds.index(member.data_seed) for member in members]
        self._sources: list[Batches] = [
            make_training_batches(dataclasses.replace(config.data, seed=seed), prepared, tokenizer)
            for seed in seeds
        ]

    def __next__(self) -> Batch:
        batches = [next(source) for source in self._sources]
        order = [0] if len(batches) == 1 else self._order
        arrays = {
            name: np.stack([batches[i][name] for i in order])
            for name in batches[0]
            if name != "cursor"
        }
        return arrays | {"cursor": batches[0]["cursor"]}

    def seek(self, cursor: int) -> None:
        for source in self._sources:
            source.seek(cursor)

    def close(self) -> None:
        for source in self._sources:
            source.close()


@jax.jit
def by_member(metrics: Mapping[str, Float[Array, " R"]]) -> dict[str, Float[Array, ""]]:
    """Return each member's loss and gradient norm, and of all the mean, and what `Run` judges."""
    names = ("train/loss", "train/grad_norm")
    each = {
        f"member_{i}/{name}": value
        for name in names
        for i, value in enumerate(jnp.unstack(metrics[name]))
    }
    return each | {
        "train/loss": jnp.mean(metrics["train/loss"]),
        "train/skipped_in_a_row": jnp.min(metrics["train/skipped_in_a_row"]),
        "train/diverging_members": jnp.sum(metrics["train/skipped_in_a_row"] > 0),
    }


def make_members_evaluation(
    config: PretrainConfig,
    model: Transformer,
    num_members: int,
    splits: Mapping[str, PreparedSplit],
) -> Callable[[Run, TrainState], None]:
    """Return (run, state) → None: each member's held-out loss and bits per byte, to the logs.

    The same batches and sums as a single run's evaluation.
    """
    score_step = make_stacked_score_step(model, tile_tokens=config.loss_tile_tokens)

    def evaluate(run: Run, state: TrainState) -> None:
        metrics = score_splits(
            score_step,
            averaged_params(state),
            splits,
            row_length=config.data.length_tokens,
            batch_sequences=config.data.batch_sequences,
            max_sequences=config.evaluation.max_sequences,
        )
        run.write_metrics(
            {
                f"member_{i}/{name}": values[i]
                for name, values in metrics.items()
                for i in range(num_members)
            }
        )
        losses = metrics[f"eval/{'all' if len(splits) > 1 else next(iter(splits))}/loss"]
        run.say(f"step {run.step}: loss {', '.join(f'{loss:.4f}' for loss in losses)}")

    return evaluate
