"""Few-shot learning of a task mixture: accuracy by model size and by number of examples shown."""

from collections.abc import Iterator, Sequence

import numpy as np

from configs.schema import EmergenceConfig
from experiments.phenomena.changes import changes_table, forecasts_table
from experiments.phenomena.common import (
    Findings,
    Row,
    StudyGroup,
    answers_of,
    seed_members,
    stacked,
    transformer,
)
from experiments.phenomena.figures import METRICS, ends_in_words, metrics_figure
from llm.data.synthetic.batches import TaskBatches
from llm.data.synthetic.few_shot import FUNCTIONS, LETTERS, few_shot_mixture, few_shot_rows
from llm.evaluation.report import Section, Table
from llm.scaling.emergence_config import FewShotConfig


def few_shot_groups(config: FewShotConfig, common: EmergenceConfig) -> Iterator[StudyGroup]:
    """Yield every model on the mixture; measured is the last answer after 0, 1, 2, … examples."""
    members = seed_members(config)
    examples = max(config.shots) + 1
    task = few_shot_mixture(config.word_letters, examples)
    function = np.arange(config.num_held_out) % len(FUNCTIONS)
    held_out = {
        shots: stacked(
            [
                few_shot_rows(
                    np.random.default_rng([10**6, shots]),
                    function,
                    config.word_letters,
                    shots + 1,
                    last_only=True,
                )
            ]
        )
        for shots in config.shots
    }
    length = examples * (2 * config.word_letters + 2) - 2
    for name, shape in config.models.items():
        model, trainable = transformer(shape, common)
        yield StudyGroup(
            name,
            trainable,
            members,
            TaskBatches([task] * len(members), list(config.seeds), config.batch_sequences),
            {f"shots_{n}": (answers_of(model), batch) for n, batch in held_out.items()},
            tokens_per_step=config.batch_sequences * length,
            facts={"model": name, "params": trainable.num_params},
            code=__file__,
        )


def describe_few_shot(config: FewShotConfig, rows: Sequence[Row]) -> Findings:
    """Return accuracy by size and by number of examples shown."""
    final = [row for row in rows if row["step"] == config.total_steps]
    table = []
    for name in config.models:
        found = [row for row in final if row["model"] == name]
        means = [np.mean([row[f"shots_{n}/exact_match"] for row in found]) for n in config.shots]
        table.append((name, found[0]["params"], *map(float, means)))
    most = max(config.shots)
    by_shots = [
        row | {"shots": n} | {f"shown/{m}": row[f"shots_{n}/{m}"] for m in METRICS}
        for row in final
        for n in config.shots
    ]
    guess = dict(choices=LETTERS, answer_tokens=config.word_letters)
    figures = (
        metrics_figure(
            "few-shot-size",
            by_shots,
            measure="shown",
            x="params",
            label="parameters",
            log=True,
            by=by_example_count,
            **guess,
            caption="At the end of training; bands: range over seeds. Exact match over size: "
            f"{ends_in_words(by_shots, 'params', 'shown/exact_match', by_example_count)}.",
            description="Few-shot accuracy and nats over model size.",
        ),
        metrics_figure(
            "few-shot-training",
            rows,
            measure=f"shots_{most}",
            x="step",
            label="training step",
            by=lambda row: row["model"],
            **guess,
            caption=f"After {most} examples, over training, by model; bands: range over seeds.",
            description="Few-shot accuracy and nats over training.",
        ),
    )
    text = (
        f"Rows show one of {len(FUNCTIONS)} functions of words ({', '.join(FUNCTIONS)}) by "
        "examples alone; models learn the mixture and are asked for the answer of a new word after "
        "so many. Without any, the function can only be guessed."
    )
    summary = {
        row[0]: dict(zip((f"{n}_shots" for n in config.shots), row[2:], strict=True))
        for row in table
    }
    columns = ("Model", "Parameters", *map(shots_in_words, config.shots))
    caption = "Exact match of held-out words, mean over seeds."
    over_size = dict(x="params", measure="shown", by=by_example_count)
    forecasts = forecasts_table(
        by_shots,
        answer_tokens=config.word_letters,
        chance_of_token=1 / LETTERS,
        **over_size,
    )
    tables = (
        Table(columns, tuple(table), caption),
        changes_table(by_shots, **over_size),
        forecasts,
    )
    section = Section("Few-shot learning", text, tables, figures)
    return Findings(section, summary)


def by_example_count(row: Row) -> str:
    return shots_in_words(row["shots"])


def shots_in_words(shots: int) -> str:
    return f"{shots} example" + "s" * (shots != 1)
