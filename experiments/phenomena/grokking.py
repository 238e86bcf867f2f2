"""Grokking: modular addition is known by heart long before it is understood."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from configs.schema import EmergenceConfig
from experiments.phenomena.changes import changes_table
from experiments.phenomena.common import (
    LEARNT,
    Findings,
    Row,
    StudyGroup,
    answers_of,
    first_step,
    runs_of,
    stacked,
    transformer,
)
from experiments.phenomena.figures import bars_figure, curves, lines_figure, metrics_figure
from llm.data.synthetic.batches import Sequences, Task, TaskBatches
from llm.data.synthetic.modular import modular_addition
from llm.evaluation.report import Figure, Section, Table
from llm.scaling.emergence_config import GrokkingConfig
from llm.scaling.fourier import fourier_power, key_frequencies
from llm.training.members import Member


def grokking_groups(config: GrokkingConfig, common: EmergenceConfig) -> Iterator[StudyGroup]:
    """Yield all seeds with every decay; measured are both splits and the embedding's spectrum."""
    members = [
        Member(config.optimizer.learning_rate, decay, seed=seed, data_seed=seed)
        for decay, seed in itertools.product(config.weight_decays, config.seeds)
    ]
    splits = [modular_addition(config.modulus, config.train_fraction, m.data_seed) for m in members]
    model, trainable = transformer(config.model, common)
    train, test = ([split[i] for split in splits] for i in range(2))

    def spectrum(params, batch):
        return {"power": fourier_power(params["embedder"]["embedding"][: config.modulus])}

    yield StudyGroup(
        f"modulo_{config.modulus}",
        trainable,
        members,
        TaskBatches(
            [whole(rows) for rows in train], [m.seed for m in members], len(train[0].tokens)
        ),
        {
            "train": (answers_of(model), stacked(train)),
            "test": (answers_of(model), stacked(test)),
            "spectrum": (spectrum, stacked(test[:1])),
        },
        tokens_per_step=train[0].weights.size,
        facts={"modulus": config.modulus, "params": trainable.num_params},
        code=__file__,
    )


def whole(rows: Sequences) -> Task:
    """Return the task that gives all rows each time."""
    return lambda generator, count: rows


def seen_in_words(table: Sequence[tuple]) -> str:
    """Return what rows of decay, seed, steps of knowing and understanding, … show."""
    parts = []
    for decay in dict.fromkeys(row[0] for row in table):
        knows, understands = ([row[i] for row in table if row[0] == decay] for i in (2, 3))
        known, understood = ([step for step in steps if step] for steps in (knows, understands))
        what = f"are right on training pairs by step {max(known)}" if known else "know no pairs"
        then = f"from step {min(understood)} on" if understood else "never"
        count = f"{len(understood)} of {len(understands)} seeds"
        parts.append(f"With decay {decay:g} runs {what}, on held-out ones {then} ({count}).")
    return " ".join(parts)


def describe_grokking(config: GrokkingConfig, rows: Sequence[Row]) -> Findings:
    """Return when each run knew its pairs and when it understood, and the embedding's spectrum."""
    table, summary = [], {}
    for (decay, seed), run in sorted(runs_of(rows, "weight_decay").items(), reverse=True):
        train, test = (first_step(run, f"{split}/exact_match") for split in ("train", "test"))
        right, keys = run[-1]["test/exact_match"], len(key_frequencies(_spectrum(config, run)))
        table.append((decay, seed, train, test, right, keys))
        summary[f"decay_{decay:g}/seed_{seed}"] = {
            "train_step": train,
            "test_step": test,
            "test_exact_match": right,
            "frequencies_for_90_percent": keys,
        }
    text = (
        f"Pairs a, b with a + b modulo {config.modulus}; a random {config.train_fraction:.0%} of "
        "them are trained on, all at each step; those of which neither order is are held out. A "
        f"run knows its pairs when it is right on {LEARNT:.0%} of them and has understood when it "
        "is right on as many of those held out. An embedding that has found the group is made of "
        f"few frequencies; a random one needs most of the {config.modulus // 2} for 90% of its "
        "variance."
    )
    columns = (
        "Decay", "Seed", "Knows at step", "Understands at step", "Right at the end", "Frequencies",
    )  # fmt: skip
    changes = changes_table(rows, x="step", measure="test", by=_by_decay)
    tables = Table(columns, tuple(table)), changes
    figures = tuple(_figures(config, rows, seen_in_words(table)))
    return Findings(Section("Grokking", text, tables, figures), summary)


def _figures(config: GrokkingConfig, rows: Sequence[Row], seen: str) -> Iterator[Figure]:
    """Yield both splits over training, the held-out one by three metrics, and the spectra."""
    splits = [
        row | {"split": split, "shown/exact_match": row[f"{split}/exact_match"]}
        for row in rows
        for split in ("train", "test")
    ]
    yield lines_figure(
        "grokking",
        curves(
            splits,
            "step",
            "shown/exact_match",
            lambda row: f"{row['split']}, {_by_decay(row)}",
        ),
        x_label="training step",
        y_label="share right",
        log_x=True,
        caption=f"{seen} Bands are the range over seeds.",
        description=f"Share right of training and held-out pairs, modulus {config.modulus}.",
    )
    yield metrics_figure(
        "grokking-metrics",
        rows,
        measure="test",
        x="step",
        label="training step",
        by=_by_decay,
        choices=config.modulus,
        answer_tokens=1,
        caption="Held-out pairs by three metrics; bands are the range over seeds.",
        description="Exact match, token accuracy and nats of held-out pairs over training.",
    )
    yield bars_figure(
        "grokking-spectrum",
        {
            f"decay {decay:g}, seed {seed}": _spectrum(config, run)
            for (decay, seed), run in sorted(runs_of(rows, "weight_decay").items(), reverse=True)
            if seed == config.seeds[0]
        },
        x_label="frequency",
        y_label="share of the embedding's variance",
        caption="The numbers' embedding at the end, by Fourier frequency.",
        description="Share of the embedding's variance at each frequency at the end.",
    )


def _spectrum(config: GrokkingConfig, run: Sequence[Row]) -> np.ndarray:
    """Return the embedding's share of variance by frequency at the end of a run."""
    return np.array([run[-1][f"spectrum/power_{k}"] for k in range(config.modulus // 2)])


def _by_decay(row: Row) -> str:
    return f"decay {row['weight_decay']:g}"
