"""What the studies of emergence share: the training of a group, and the rows that it leaves."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from scipy import stats

from configs.schema import EmergenceConfig
from experiments.members import train_members
from llm.data.synthetic.batches import Batch, Sequences, as_batch
from llm.evaluation.answers import answer_scores
from llm.evaluation.report import Section
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.scaling.accounting import num_params
from llm.scaling.emergence_config import StudyConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.members import Member, MemberRuns
from llm.training.metrics import read_metrics
from llm.training.run import Run
from llm.training.schedules import make_schedule
from llm.training.state import TrainState
from llm.training.step import LossFn

Row = dict[str, Any]
LEARNT = 0.99  # a share right that counts as learnt
# (params, batch) → numbers by name; arrays come out one number an entry, as name_{i}.
Measure = Callable[[dict, Batch], dict[str, jax.Array]]


class Findings(NamedTuple):
    """What the rows of a phenomenon say: its section of the report, numbers for summary.json."""

    section: Section
    summary: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A model as training sees it."""

    init: Callable[[jax.Array], dict]
    axes: dict
    loss_fn: LossFn
    num_params: int


@dataclasses.dataclass(frozen=True)
class StudyGroup:
    """Runs of one shape that train together, and what is measured of them.

    `measures` are a function of one member's parameters and of a batch, whose arrays have the
    members' own on axis 0 ([R …]), or one for all ([1 …]). `facts` are columns of all rows, `told`
    those of each member.
    """

    name: str
    trainable: Trainable
    members: Sequence[Member]
    batches: Any
    measures: Mapping[str, tuple[Measure, Batch]]
    tokens_per_step: int
    facts: Mapping[str, Any]
    code: str  # the file that makes the data, the model and what is measured
    told: Sequence[Mapping[str, Any]] | None = None

    def runs(self, study: StudyConfig) -> MemberRuns:
        """Return them as training takes them."""
        return MemberRuns(
            self.members,
            self.trainable.init,
            self.trainable.axes,
            self.trainable.loss_fn,
            study.optimizer,
            make_schedule(
                study.schedule,
                total_steps=study.total_steps,
                tokens_per_step=self.tokens_per_step,
            ),
        )


def seed_members(study: StudyConfig) -> list[Member]:
    """Return a member for each seed, at the optimizer's own rate and decay."""
    rate, decay = study.optimizer.learning_rate, study.optimizer.weight_decay
    return [Member(rate, decay, seed=seed, data_seed=seed) for seed in study.seeds]


def transformer(
    config: TransformerConfig, common: EmergenceConfig
) -> tuple[Transformer, Trainable]:
    """Return a transformer, and what training needs of it."""
    model = Transformer(config, common.compute)
    return model, Trainable(
        functools.partial(init_params, model),
        logical_axes(model),
        make_causal_lm_loss(model),
        num_params(config),
    )


def train_study(
    groups: Iterable[StudyGroup], study: StudyConfig, common: EmergenceConfig, workdir: epath.Path
) -> list[Row]:
    """Train all groups of a phenomenon to the end, or go on; return their evaluations."""
    rows = []
    for group in groups:
        _train_group(group, study, common, workdir / group.name)
        rows += read_rows(workdir / group.name, group)
    return rows


def _train_group(
    group: StudyGroup, study: StudyConfig, common: EmergenceConfig, workdir: epath.Path
) -> None:
    fields = {
        "study": dataclasses.asdict(study),
        "facts": dict(group.facts),
        "compute": dataclasses.asdict(common.compute),
        "members": [dataclasses.asdict(member) for member in group.members],
    }
    run = Run(
        workdir,
        fields,
        dataclasses.replace(common.run, save_every_steps=0, save_every_seconds=30.0),
        total_steps=study.total_steps,
        tokens_per_step=group.tokens_per_step * len(group.members),
        code=group.code,
    )
    train_members(
        run,
        group.runs(study),
        group.batches,
        make_measuring(group.measures, len(group.members)),
        evaluate_every_steps=-(-study.total_steps // study.num_evaluations),
    )


def make_measuring(
    measures: Mapping[str, tuple[Measure, Batch]], num_members: int
) -> Callable[[Run, TrainState], None]:
    """Return (run, state) → None: every measure of every member, to the log as
    member_{i}/eval/{measure}/{name}."""

    def mapped(measure: Measure, batch: Batch):
        shared = next(iter(batch.values())).shape[0] == 1 and num_members > 1
        arrays = {name: x[0] if shared else x for name, x in batch.items()}
        both = jax.jit(jax.vmap(measure, in_axes=(0, None if shared else 0)))
        return lambda params: both(params, arrays)

    functions = {name: mapped(measure, batch) for name, (measure, batch) in measures.items()}

    def evaluate(run: Run, state: TrainState) -> None:
        metrics = {}
        for measure, function in functions.items():
            for name, values in jax.device_get(function(state.params)).items():
                for i, value in enumerate(values):
                    for suffix, number in _numbers(value):
                        metrics[f"member_{i}/eval/{measure}/{name}{suffix}"] = number
        run.write_metrics(metrics)

    return evaluate


def _numbers(value) -> list[tuple[str, float]]:
    if value.ndim == 0:
        return [("", float(value))]
    return [(f"_{j}", float(x)) for j, x in enumerate(value.reshape(-1))]


def stacked(sequences: Sequence[Sequences]) -> Batch:
    """Return evaluation batches side by side: [R B …]."""
    batches = [as_batch(rows) for rows in sequences]
    return {name: jax.numpy.stack([b[name] for b in batches]) for name in batches[0]}


def answers_of(model: Transformer) -> Measure:
    """Return the measure of answers by exact match, token accuracy and nats."""

    def measure(params: dict, batch: Batch) -> dict[str, jax.Array]:
        logits = model.apply(
            {"params": params},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )
        logits = logits[..., : model.config.vocab_size]
        return answer_scores(logits, batch["targets"], batch["loss_weights"])

    return measure


def read_rows(workdir: epath.Path, group: StudyGroup) -> list[Row]:
    """Return one row for each evaluation of each member: facts of the group, what is told of the
    member, its seed and decay, the step, and `{measure}/{name}` columns."""
    told = group.told or [{}] * len(group.members)
    about = [
        {**group.facts, **of, "seed": member.seed, "weight_decay": member.weight_decay}
        for member, of in zip(group.members, told, strict=True)
    ]
    rows = []
    for line in read_metrics(workdir):
        for i, of in enumerate(about):
            prefix = f"member_{i}/eval/"
            found = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
            if found:
                rows.append(of | {"step": int(line["step"])} | found)
    return rows


def first_step(rows: Sequence[Row], metric: str, least: float = LEARNT) -> int | None:
    """Return the first step at which a metric of one run reaches a level; None: never."""
    reached = [row["step"] for row in rows if row.get(metric, -np.inf) >= least]
    return min(reached, default=None)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of shares over seeds and its Student-t interval, within 0 and 1."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0, 1.0
    width = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return mean, max(0.0, mean - float(width)), min(1.0, mean + float(width))


def runs_of(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """Return the rows of each run, by the values of the given columns and its seed."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((*(row[name] for name in names), row["seed"]), []).append(row)
    return found
