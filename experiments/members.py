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
from llm.data.loader import Batch, Batches, make_evaluation_batches
from llm.data.pipeline import make_training_batches
from llm.data.prepare import Prepared, prepare
from llm.data.prepared import PreparedSplit
from llm.data.tokenizer_training import make_tokenizer
from llm.data.tokenizers import Tokenizer
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.scaling.accounting import training_flops_per_token
from llm.training.config import OptimizerConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.members import Member, init_members, make_members_step, members_mesh
from llm.training.run import Run
from llm.training.schedules import Schedule, make_schedule
from llm.training.state import TrainState, averaged_params
from llm.training.step import LossFn


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
    )
    tokenizer.save(run.workdir / "tokenizer")
    train_members(
        run,
        members,
        init=functools.partial(init_params, model),
        axes=logical_axes(model),
        loss_fn=make_causal_lm_loss(
            model, z_loss=config.z_loss, tile_tokens=config.loss_tile_tokens
        ),
        optimizer=config.optimizer,
        schedule=make_schedule(
            config.schedule, total_steps=config.num_steps, tokens_per_step=config.tokens_per_step
        ),
        batches=MemberBatches(config, members, prepared, tokenizer),
        evaluate=make_members_evaluation(config, model, len(members), prepared.validation),
        evaluate_every_steps=config.evaluation.every_steps,
        width_ratio=config.model.width_ratio,
        accumulate_steps=config.accumulate_steps,
    )


def train_members(
    run: Run,
    members: Sequence[Member],
    *,
    init: Callable[[jax.Array], dict],
    axes: dict,
    loss_fn: LossFn,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    batches: Any,
    evaluate: Callable[[Run, TrainState], None],
    evaluate_every_steps: int,
    width_ratio: float | None = None,
    accumulate_steps: int = 1,
) -> TrainState:
    """Train members of any model to the end of the run; return their stacked state.

    A member whose gradient is not finite is left where it was, and the run gives up when all are.
    """
    mesh = members_mesh(len(members))
    train_step = make_members_step(
        loss_fn,
        axes,
        optimizer,
        schedule,
        members,
        mesh,
        width_ratio=width_ratio,
        accumulate_steps=accumulate_steps,
    )
    with run:
        state = init_members(init, axes, optimizer, members, mesh, width_ratio=width_ratio)

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
    loss_fn = make_causal_lm_loss(model, tile_tokens=config.loss_tile_tokens)
    score = jax.jit(
        jax.vmap(lambda params, batch: loss_fn(params, batch, None)[1], in_axes=(0, None))
    )
    size, limit = config.data.batch_sequences, config.evaluation.max_sequences

    def scores_of(split: PreparedSplit, params: dict) -> tuple[np.ndarray, float, float]:
        batches = make_evaluation_batches(split, config.data.length_tokens, size)
        nats, tokens = np.zeros(num_members), 0.0
        for i, batch in enumerate(batches):
            if limit is not None and i * size >= limit:
                break
            sums = score(params, {name: x for name, x in batch.items() if name != "cursor"})
            nats += np.asarray(sums["loss"], np.float64)
            tokens += float(sums["tokens"][0])
        batches.close()
        bytes_per_token = float(split.num_bytes.sum()) / max(1, int(split.num_targets.sum()))
        return nats, tokens, tokens * bytes_per_token

    def evaluate(run: Run, state: TrainState) -> None:
        params = averaged_params(state)
        scores = {name: scores_of(split, params) for name, split in splits.items()}
        if len(scores) > 1:
            scores["all"] = tuple(sum(parts) for parts in zip(*scores.values(), strict=True))
        metrics = {}
        for name, (nats, tokens, num_bytes) in scores.items():
            for i in range(num_members):
                metrics[f"member_{i}/eval/{name}/loss"] = nats[i] / tokens
                bits = nats[i] / np.log(2) / num_bytes
                metrics[f"member_{i}/eval/{name}/bits_per_byte"] = bits
        run.write_metrics(metrics)
        losses = scores["all" if len(scores) > 1 else next(iter(scores))]
        run.say(f"step {run.step}: loss {', '.join(f'{x / losses[1]:.4f}' for x in losses[0])}")

    return evaluate
