"""What a ladder's groups become: pretraining recipes, predicted seconds, rows of one table."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from etils import epath

from configs.schema import EvaluationConfig, PretrainConfig, ScalingConfig
from experiments.members import member_runs, pretrain_members
from experiments.pretrain import pretrain
from llm.data.prepare import Prepared
from llm.scaling.accounting import num_active_params, num_layer_params, num_params
from llm.scaling.hardware import peak_flops
from llm.scaling.ladder import Group, make_groups
from llm.scaling.memory import count_training_memory
from llm.training.members import Member, members_mesh
from llm.training.metrics import read_metrics

# Beside its steps a run compiles initialisation and evaluation, opens, saves: on two CPU cores 8 s
# where the first step took 3.
_START_IN_FIRST_STEPS = 2.5
_ASSUMED_MFU = 0.4  # of runs too large to try out before the plan is shown


def groups_of(config: ScalingConfig, vocab_size: int) -> list[Group]:
    """Return the groups of all ladders, in the ladders' order and smallest first in each.

    Raises:
      ValueError: a ladder asks for what cannot be.
    """
    return [
        group
        for name, ladder in config.ladders.items()
        for group in make_groups(
            name,
            ladder,
            vocab_size=vocab_size,
            length_tokens=config.data.length_tokens,
            batch_sequences=config.data.batch_sequences,
        )
    ]


def recipe_of(config: ScalingConfig, group: Group, member: Member) -> PretrainConfig:
    """Return the config of one run of a group, which `experiments.pretrain` would run alone."""
    rate, unique = member.learning_rate, group.unique_tokens
    optimizer = dataclasses.replace(
        group.optimizer,
        learning_rate=rate,
        adam_learning_rate=rate
        * group.optimizer.adam_learning_rate
        / group.optimizer.learning_rate,
        weight_decay=member.weight_decay,
    )
    rows = None if unique is None else max(1, round(unique / config.data.length_tokens))
    return PretrainConfig(
        model=group.model,
        init_scale=member.init_scale,
        total_steps=group.num_steps,
        compute=config.compute,
        mesh=config.mesh,
        data=dataclasses.replace(config.data, seed=member.data_seed, unique_rows=rows),
        optimizer=optimizer,
        schedule=group.schedule,
        evaluation=EvaluationConfig(
            every_steps=-(-group.num_steps // config.num_evaluations),
            max_sequences=config.max_evaluation_sequences,
        ),
        run=config.run,
        accumulate_steps=config.accumulate_steps,
        loss_tile_tokens=config.loss_tile_tokens,
        seed=member.seed,
    )


def train_group(config: ScalingConfig, group: Group, workdir: epath.Path) -> None:
    """Train the runs of a group, or go on with them."""
    recipe = recipe_of(config, group, group.members[0])
    if len(group.members) == 1:
        pretrain(recipe, str(workdir / group.name))
    else:
        pretrain_members(recipe, group.members, workdir / group.name)


class Prediction(NamedTuple):
    """What a group will take: seconds of training, and bytes on all devices together."""

    seconds: float
    num_bytes: int


def predict(config: ScalingConfig, groups: Sequence[Group]) -> dict[str, Prediction]:
    """Return what each group is predicted to take.

    Time by trying some steps of each shape, evaluations counted as a third of a step a batch; of
    single runs on accelerators, which may fill a slice, by a FLOP rate of 40% of the peak and
    nothing else. Memory by counting, nothing sharded or shared.
    """
    peak = peak_flops(jax.devices())
    tried: dict[tuple, tuple[float, float, int]] = {}
    found = {}
    for group in groups:
        by_rate = peak is not None and len(group.members) == 1
        shape = (group.model, group.optimizer.name, len(group.members))
        if shape not in tried:
            seconds = (0.0, 0.0) if by_rate else _first_and_later_step(config, group)
            tried[shape] = *seconds, _num_bytes(config, group)
        first, later, num_bytes = tried[shape]
        if by_rate:
            seconds = group.flops / peak / _ASSUMED_MFU
        else:
            steps = group.num_steps + _evaluation_batches(config) / 3
            seconds = _START_IN_FIRST_STEPS * first + steps * later
        found[group.name] = Prediction(seconds, num_bytes)
    return found


def _evaluation_batches(config: ScalingConfig) -> float:
    sequences = (config.max_evaluation_sequences or 0) * len(config.data.sources)
    return (config.num_evaluations + 1) * sequences / config.data.batch_sequences


def _num_bytes(config: ScalingConfig, group: Group) -> int:
    memory = count_training_memory(
        group.model,
        config.compute,
        group.optimizer,
        batch_sequences=config.data.batch_sequences // config.accumulate_steps,
        length_tokens=config.data.length_tokens,
        loss_tile_tokens=config.loss_tile_tokens,
    )
    return memory.total * len(group.members)


def _first_and_later_step(config: ScalingConfig, group: Group) -> tuple[float, float]:
    """Return the seconds of a first step, which compiles, and of those after it."""
    recipe = recipe_of(config, group, group.members[0])
    mesh, runs = members_mesh(len(group.members)), member_runs(recipe, group.members)
    state, step = runs.init_state(mesh), runs.make_step(mesh)
    shape = (len(group.members), recipe.data.batch_sequences, recipe.data.length_tokens)
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, shape, np.int32)
    batch = {name: tokens for name in ("tokens", "targets")}
    batch |= {"segment_ids": np.ones_like(tokens), "positions": np.zeros_like(tokens)}
    batch |= {"loss_weights": np.ones(shape, np.float32), "cursor": np.uint32(0)}
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return seconds[0], statistics.mean(seconds[1:])


# ------------------------------------------------------------------------------- tables


def evaluation_rows(
    config: ScalingConfig, groups: Sequence[Group], prepared: Prepared, workdir: epath.Path
) -> list[dict]:
    """Return one row for each evaluation of each run on each held-out source.

    `params` are the active ones (the head counted, lookup tables not), `flops` six for each of them
    and token, `executed_flops` with attention's, `epochs` how often the text there is was read.
    """
    available = sum(int(split.num_targets.sum()) for split in prepared.train.values())
    found = []
    for group in groups:
        unique = min(available, group.unique_tokens or available)
        for i, member, lines in _lines_by_member(group, workdir):
            facts = _run_facts(group, member, i, unique)
            found.extend(facts | row for row in _evaluations(group, lines, unique))
    return found


def final_rows(rows: Sequence[Mapping]) -> list[dict]:
    """Return the last evaluation of each run, on all sources together where there are several."""
    sources = {row["source"] for row in rows}
    wanted = "all" if "all" in sources else next(iter(sources))
    return [dict(row) for row in rows if row["final"] and row["source"] == wanted]


def write_table(rows: Sequence[Mapping], path: epath.Path) -> None:
    """Write rows as path.csv and path.parquet."""
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    with (path.parent / f"{path.name}.csv").open("wb") as file:
        pyarrow.csv.write_csv(table, file)
    with (path.parent / f"{path.name}.parquet").open("wb") as file:
        pyarrow.parquet.write_table(table, file)


def _run_facts(group: Group, member: Member, index: int, unique: int) -> dict:
    model = group.model
    return {
        "ladder": group.ladder,
        "run": f"{group.name}/{index}",
        "depth": group.depth,
        "width": model.width,
        "layers": model.num_layers,
        "params": num_active_params(model),
        "layer_params": num_layer_params(model),
        "all_params": num_params(model),
        "parametrisation": "standard" if model.mup_base_width is None else "muP",
        "optimizer": group.optimizer.name,
        **dataclasses.asdict(member),
        "budget": group.budget,
        "unique_tokens": unique,
        "regime": "repeated" if group.num_tokens > unique else "infinite",
    }


def _lines_by_member(
    group: Group, workdir: epath.Path
) -> Iterator[tuple[int, Member, list[dict[str, float]]]]:
    """Yield each member with the lines of the group's log, its own names made plain."""
    lines = read_metrics(workdir / group.name)
    for i, member in enumerate(group.members):
        prefix = "" if len(group.members) == 1 else f"member_{i}/"
        yield (
            i,
            member,
            [
                {"step": line["step"]}
                | {
                    name.removeprefix(prefix): value
                    for name, value in line.items()
                    if name.startswith(prefix)
                }
                for line in lines
            ],
        )


def _evaluations(group: Group, lines: Sequence[Mapping], unique: int) -> Iterator[dict]:
    train_loss = None
    for line in lines:
        train_loss = line.get("train/loss", train_loss)
        for name in line:
            if not (name.startswith("eval/") and name.endswith("/loss")):
                continue
            source = name.split("/")[1]
            tokens = int(line["step"]) * group.tokens_per_step
            yield {
                "step": int(line["step"]),
                "final": line["step"] == group.num_steps,
                "tokens": tokens,
                "epochs": tokens / unique,
                "flops": 6.0 * num_active_params(group.model) * tokens,
                "executed_flops": group.executed_flops_per_token * tokens,
                "source": source,
                "loss": line[name],
                "bits_per_byte": line[f"eval/{source}/bits_per_byte"],
                "in_context_score": line.get(f"eval/{source}/in_context_score"),
                "train_loss": train_loss,
            }
