"""Induction heads: two layers of attention find what followed last time, and one cannot."""

from collections.abc import Iterator, Sequence

import numpy as np
from jax import numpy as jnp

from configs.schema import EmergenceConfig
from experiments.phenomena.changes import changes_table
from experiments.phenomena.common import (
    Findings,
    Measure,
    Row,
    StudyGroup,
    answers_of,
    first_step,
    runs_of,
    seed_members,
    stacked,
    transformer,
)
from experiments.phenomena.figures import curves, lines_figure, metrics_figure
from llm.data.synthetic.batches import TaskBatches
from llm.data.synthetic.repeats import repeated_segments, repeated_twice
from llm.evaluation.report import Section, Table
from llm.models.transformer import Transformer
from llm.scaling.emergence_config import InductionConfig
from llm.scaling.induction import attention_weights, prefix_matching_scores


def induction_groups(config: InductionConfig, common: EmergenceConfig) -> Iterator[StudyGroup]:
    """Yield every model; measured are a random segment and its repetition."""
    members = seed_members(config)
    task = repeated_segments(
        config.vocab_size, config.length_tokens, shortest=config.shortest_segment_tokens
    )
    segment = config.length_tokens // 2
    held_out = stacked(
        [
            repeated_twice(
                np.random.default_rng(10**6), config.vocab_size, segment, config.num_held_out
            )
        ]
    )
    for name, shape in config.models.items():
        model, trainable = transformer(shape, common)
        yield StudyGroup(
            name,
            trainable,
            members,
            TaskBatches([task] * len(members), list(config.seeds), config.batch_sequences),
            {
                "repeat": (answers_of(model), held_out),
                "heads": (heads_of(model, segment), held_out),
            },
            tokens_per_step=config.batch_sequences * config.length_tokens,
            facts={"model": name, "layers": shape.num_layers, "params": trainable.num_params},
            code=__file__,
        )


def heads_of(model: Transformer, segment_tokens: int) -> Measure:
    """Return the measure of the best head's prefix matching, and of every head's."""

    def measure(params, batch):
        weights = attention_weights(model, params, batch["tokens"])
        scores = prefix_matching_scores(weights, segment_tokens)
        return {"best_prefix_matching": jnp.max(scores), "prefix_matching": scores}

    return measure


def describe_induction(config: InductionConfig, rows: Sequence[Row]) -> Findings:
    """Return the best head's prefix matching and the loss on repetitions, by number of layers."""
    table, summary = [], {}
    tokens = config.length_tokens // 2 - 1
    half = -tokens * np.log(config.vocab_size) / 2
    for (name, seed), run in sorted(runs_of(rows, "model").items()):
        last = max(run, key=lambda row: row["step"])
        score = last["heads/best_prefix_matching"]
        accuracy, nats = last["repeat/token_accuracy"], last["repeat/answer_nats"] / tokens
        attends = first_step(run, "heads/best_prefix_matching", 0.5)
        falls = first_step([r | {"-nats": -r["repeat/answer_nats"]} for r in run], "-nats", half)
        table.append((name, seed, score, accuracy, nats, attends, falls))
        summary[f"{name}/seed_{seed}"] = {
            "best_prefix_matching": score,
            "token_accuracy": accuracy,
            "prefix_matching_half_at_step": attends,
            "nats_half_at_step": falls,
        }
    by = lambda row: row["model"]  # noqa: E731
    seen = seen_in_words(table)
    figures = (
        lines_figure(
            "induction-heads",
            curves(rows, "step", "heads/best_prefix_matching", by),
            x_label="training step",
            y_label="prefix matching of the best head",
            caption="Attention to the token after the same one before; bands: range over seeds. "
            f"{seen}",
            description="Prefix-matching score of the best head over training, by layers.",
        ),
        metrics_figure(
            "induction-metrics",
            rows,
            measure="repeat",
            x="step",
            label="training step",
            by=by,
            choices=config.vocab_size,
            answer_tokens=tokens,
            caption="The second occurrence of a random segment by three metrics.",
            description="Exact match, token accuracy and nats of a repetition over training.",
        ),
    )
    text = (
        "Models of attention alone learn rows of one random segment over and over, of unknown "
        "length. A head that looks from a token to what followed it last time predicts all but "
        "the first occurrence; it needs a layer below that tells each token what came before it, "
        "so one layer cannot have it."
    )
    columns = (
        "Model", "Seed", "Prefix matching", "Token accuracy", "Nats a token",
        "Prefix matching above 0.5 at step", "Nats below half of chance at step",
    )  # fmt: skip
    heads = {"heads/best_prefix_matching": "prefix matching"}
    changes = changes_table(rows, x="step", measure="repeat", by=by, others=heads)
    section = Section("Induction heads", text, (Table(columns, tuple(table)), changes), figures)
    return Findings(section, summary)


def seen_in_words(table: Sequence[tuple]) -> str:
    """Return what rows of model, seed, score, accuracy, nats, steps of rise and fall, … show."""
    parts = []
    for model in dict.fromkeys(row[0] for row in table):
        rows = [row for row in table if row[0] == model]
        scores, risen = [row[2] for row in rows], [row for row in rows if row[5] is not None]
        what = f"{model}: {min(scores):.2f} to {max(scores):.2f} at the end"
        fallen = [row for row in risen if row[6] is not None]
        if fallen:
            apart = max(abs(row[5] - row[6]) for row in fallen)
            what += (
                f", above 0.5 in {len(risen)} of {len(rows)} seeds, there within {apart:,} steps "
                "of the loss falling below half of chance's"
            )
        parts.append(f"{what}.")
    return " ".join(parts)
