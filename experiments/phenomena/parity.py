"""Multitask sparse parity: each skill is learnt at a stroke, their mean falls as a power law."""

import math
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import EmergenceConfig
from experiments.phenomena.changes import changes_table, forecasts_table
from experiments.phenomena.common import (
    Findings,
    Row,
    StudyGroup,
    Trainable,
    first_step,
    runs_of,
    seed_members,
)
from experiments.phenomena.figures import curves, lines_figure, metrics_figure
from llm.data.synthetic.parity import SparseParity
from llm.evaluation.report import Figure, Section, Table
from llm.models.mlp import ParityNetwork
from llm.scaling.emergence_config import ParityConfig

_HALF = 0.35  # nats of a subtask, half of chance's, below which it counts as learnt


def parity_groups(config: ParityConfig, common: EmergenceConfig) -> Iterator[StudyGroup]:
    """Yield every width; measured are each subtask, and their mean by how often they come."""
    members = seed_members(config)
    problems = [
        SparseParity(
            config.num_subtasks, config.num_bits, config.subset_bits, config.alpha, member.data_seed
        )
        for member in members
    ]
    held_out = held_out_rows(problems, config.held_out_rows_per_subtask)
    for width in config.widths:
        network = ParityNetwork(config.num_subtasks, config.num_bits, width)
        trainable = as_trainable(network)
        yield StudyGroup(
            f"w{width}",
            trainable,
            members,
            ParityBatches(problems, [m.data_seed for m in members], config.batch_rows),
            {"test": (by_subtask(network, jnp.asarray(problems[0].frequencies)), held_out)},
            tokens_per_step=config.batch_rows,
            facts={"model": f"w{width}", "width": width, "params": trainable.num_params},
            code=__file__,
        )


def as_trainable(network: ParityNetwork) -> Trainable:
    """Return what training needs of the network."""
    shapes = (jnp.zeros(1, jnp.int32), jnp.zeros((1, network.num_bits)))

    def boxed(key):
        return network.init(key, *shapes)["params"]

    def loss_fn(params, batch, key):
        logits = network.apply({"params": params}, batch["subtask"], batch["bits"])
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, batch["parity"][:, None], axis=1)[:, 0]
        loss = -jnp.sum(chosen)
        return loss, {"loss": loss, "tokens": jnp.float32(len(chosen))}

    example = jax.eval_shape(boxed, jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return Trainable(
        init=lambda key: nn.unbox(boxed(key)),
        axes=jax.tree.map(lambda box: box.names, example, is_leaf=is_box),
        loss_fn=loss_fn,
        num_params=sum(x.size for x in jax.tree.leaves(example)),
    )


def by_subtask(network: ParityNetwork, frequencies: jax.Array):
    """Return the measure of accuracy and nats by subtask, and weighed by frequency together."""

    def measure(params, batch):
        def one(subtask, bits, parity):
            logits = network.apply({"params": params}, subtask, bits)
            log_probs = jax.nn.log_softmax(logits)
            chosen = jnp.take_along_axis(log_probs, parity[:, None], axis=1)[:, 0]
            right = jnp.argmax(logits, axis=1) == parity
            return -jnp.mean(chosen), jnp.mean(right)

        nats, accuracy = jax.vmap(one)(batch["subtask"], batch["bits"], batch["parity"])
        return {
            "answer_nats": jnp.sum(nats * frequencies),
            "exact_match": jnp.sum(accuracy * frequencies),
            "subtask_nats": nats,
        }

    return measure


def held_out_rows(problems: list[SparseParity], each: int) -> dict[str, jax.Array]:
    """Return rows of every subtask of every member: [R subtasks each …]."""
    found: dict[str, list[np.ndarray]] = {}
    for problem in problems:
        subtasks = np.repeat(np.arange(problem.num_subtasks), each)
        rows = problem.rows_of(np.random.default_rng([problem.seed, 10**6]), subtasks)
        for name, array in rows._asdict().items():
            shaped = array.reshape(problem.num_subtasks, each, *array.shape[1:])
            found.setdefault(name, []).append(shaped)
    return {name: jnp.stack(arrays) for name, arrays in found.items()}


class ParityBatches:
    """Batches [R B …] of rows, each a function of problem, seed and place."""

    def __init__(self, problems: list[SparseParity], seeds: list[int], batch_rows: int):
        self._problems, self._seeds, self._batch_rows = problems, seeds, batch_rows
        self._cursor = 0

    def __next__(self) -> dict[str, np.ndarray]:
        index = self._cursor // self._batch_rows
        rows = [
            problem.rows(np.random.default_rng([seed, 1, index]), self._batch_rows)._asdict()
            for problem, seed in zip(self._problems, self._seeds, strict=True)
        ]
        self._cursor += self._batch_rows
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return arrays | {"cursor": np.uint32(self._cursor)}

    def seek(self, cursor: int) -> None:
        self._cursor = int(cursor)

    def close(self) -> None:
        """Nothing is open."""


def describe_parity(config: ParityConfig, rows: Sequence[Row]) -> Findings:
    """Return when each skill was learnt, the mean loss over training, and over size."""
    final = [row for row in rows if row["step"] == config.total_steps]
    subtasks, widest = range(config.num_subtasks), max(config.widths)
    table = []
    for width in config.widths:
        found = [row for row in final if row["width"] == width]
        nats = [row["test/answer_nats"] for row in found]
        skills = [sum(row[f"test/subtask_nats_{i}"] < _HALF for i in subtasks) for row in found]
        table.append((width, found[0]["params"], np.mean(nats), np.mean(skills)))
    slope = power_law_exponent([row[1] for row in table], [row[2] for row in table])
    learnt = {
        seed: [step_learnt(run, i) for i in subtasks]
        for (width, seed), run in runs_of(rows, "width").items()
        if width == widest
    }
    in_steps, factor = slope_over_steps(rows, widest), steps_to_learn(rows, config)
    text = (
        f"{config.num_subtasks} subtasks, each the parity of its own {config.subset_bits} of "
        f"{config.num_bits} bits, are drawn the less often the later they stand (exponent "
        f"{config.alpha + 1:g}). A subtask is at chance, 0.69 nats, until learnt, then near 0: "
        f"from 90% of chance to 10% the number of steps grows {factor:.1f} times (median of what "
        f"width {widest} learns). Their mean is smooth: over the last nine tenths of training it "
        f"falls as steps to the power {in_steps:.2f}, and over sizes as parameters to the power "
        f"{slope:.2f} (Michaud et al. expect −α = {-config.alpha:g} where only size limits)."
    )
    summary = {
        "skill_steps": {f"seed_{seed}": steps for seed, steps in learnt.items()},
        "mean_nats_by_width": {str(row[0]): row[2] for row in table},
        "exponent_in_parameters": slope,
        "exponent_in_steps": in_steps,
        "steps_ratio_from_90_to_10_percent": factor,
    }
    shown = [row | {"test/token_accuracy": row["test/exact_match"]} for row in final]
    over_size = dict(x="params", measure="test", by=lambda row: "all subtasks")
    tables = (
        Table(("Width", "Parameters", "Nats", "Subtasks learnt"), tuple(table)),
        changes_table(shown, **over_size),
        forecasts_table(shown, answer_tokens=1, chance_of_token=0.5, **over_size),
    )
    figures = (
        _skills_figure(config, rows, learnt[config.seeds[0]]),
        lines_figure(
            "parity-mean",
            curves(
                [row for row in rows if row["step"] > 0],
                "step",
                "test/answer_nats",
                lambda row: f"width {row['width']}",
            ),
            x_label="training step",
            y_label="nats, weighed by frequency",
            log_x=True,
            log_y=True,
            caption="All subtasks as often as they come; bands: range over seeds.",
            description="Mean loss over training by width.",
        ),
        metrics_figure(
            "parity-size",
            shown,
            measure="test",
            x="params",
            label="parameters",
            log=True,
            by=lambda row: "all subtasks",
            choices=2,
            answer_tokens=1,
            caption=f"At the end of training {table[0][3]:.1f} subtasks are learnt at "
            f"{table[0][1]:,} parameters and {table[-1][3]:.1f} at {table[-1][1]:,} (means over "
            "seeds); of answers of one token accuracy is exact match.",
            description="Accuracy and loss over the number of parameters.",
        ),
    )
    return Findings(Section("Sparse parity", text, tables, figures), summary)


def step_learnt(run: Sequence[Row], subtask: int, nats: float = _HALF) -> int | None:
    """Return the first step at which a subtask's loss is below so many nats; None: never."""
    return first_step(
        [{**row, "right": -row[f"test/subtask_nats_{subtask}"]} for row in run], "right", -nats
    )


def _skills_figure(config: ParityConfig, rows: Sequence[Row], learnt: Sequence) -> Figure:
    """Draw some subtasks of the widest network in one seed over training."""
    widest = max(config.widths)
    run = [
        row
        for row in rows
        if (row["width"], row["seed"]) == (widest, config.seeds[0]) and row["step"] > 0
    ]
    steps = [step for step in learnt if step is not None]
    between = f", between steps {min(steps):,} and {max(steps):,}" if steps else ""
    return lines_figure(
        "parity-skills",
        {
            f"subtask {i + 1}": curves(run, "step", f"test/subtask_nats_{i}", lambda row: 0)[0]
            for i in _spread(config.num_subtasks)
        },
        x_label="training step",
        y_label="nats",
        log_x=True,
        caption=f"Some subtasks, width {widest}, one seed. Of all {config.num_subtasks} "
        f"{len(steps)} are learnt{between}: each falls below half of chance once it is.",
        description="Loss of single subtasks over training.",
    )


def slope_over_steps(rows: Sequence[Row], width: int) -> float:
    """Return the exponent of a width's mean loss in steps, from a tenth of training on."""
    of_width = [row for row in rows if row["width"] == width]
    steps, nats = curves(of_width, "step", "test/answer_nats", lambda row: 0)[0]
    late = steps >= steps.max() / 10
    return power_law_exponent(steps[late], nats.mean(axis=1)[late])


def steps_to_learn(rows: Sequence[Row], config: ParityConfig) -> float:
    """Return by what factor steps grow from 90% of chance's loss to 10%, as the median over the
    widest network's subtasks and seeds that get there; NaN: none does."""
    chance, factors = math.log(2), []
    for (width, _), run in runs_of(rows, "width").items():
        for i in range(config.num_subtasks) if width == max(config.widths) else ():
            begin, end = (step_learnt(run, i, share * chance) for share in (0.9, 0.1))
            if begin and end:
                factors.append(end / begin)
    return float(np.median(factors)) if factors else math.nan


def power_law_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x; NaN of fewer than two sizes."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else float("nan")


def _spread(count: int, shown: int = 7) -> list[int]:
    """Return some indices up to count, from the first on, further and further apart."""
    return sorted({round(i) - 1 for i in np.geomspace(1, count, shown)})
