"""Addition of several digits: the order of the sum's digits decides how many examples it takes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from configs.schema import EmergenceConfig
from experiments.phenomena.changes import changes_table, forecasts_table
from experiments.phenomena.common import (
    Findings,
    Row,
    StudyGroup,
    answers_of,
    mean_interval,
    stacked,
    transformer,
)
from experiments.phenomena.figures import ends_in_words, metrics_figure
from llm.data.synthetic.addition import addition_split, drawn_from
from llm.data.synthetic.batches import TaskBatches
from llm.evaluation.report import Figure, Section, Table
from llm.models.config import TransformerConfig
from llm.scaling.emergence_config import AdditionConfig
from llm.training.members import Member


def addition_groups(config: AdditionConfig, common: EmergenceConfig) -> Iterator[StudyGroup]:
    """Yield each size on each number of digits; orders, numbers of examples, seeds together."""
    for digits, (name, shape) in itertools.product(config.digits, config.models.items()):
        yield _group(config, common, digits, name, shape)


def _group(
    config: AdditionConfig,
    common: EmergenceConfig,
    digits: int,
    name: str,
    shape: TransformerConfig,
) -> StudyGroup:
    variants = list(itertools.product(config.orders, config.num_examples, config.seeds))
    members = [
        Member(config.optimizer.learning_rate, config.optimizer.weight_decay, seed, seed)
        for _, _, seed in variants
    ]
    splits = [
        addition_split(
            digits, order, num_train=examples, num_held_out=config.num_held_out, seed=seed
        )
        for order, examples, seed in variants
    ]
    model, trainable = transformer(shape, common)
    return StudyGroup(
        f"{name}_{digits}digits",
        trainable,
        members,
        TaskBatches(
            [drawn_from(train) for train, _ in splits],
            [member.data_seed for member in members],
            config.batch_sequences,
        ),
        {"test": (answers_of(model), stacked([held_out for _, held_out in splits]))},
        tokens_per_step=splits[0][0].weights.shape[1] * config.batch_sequences,
        facts={"model": name, "params": trainable.num_params, "digits": digits},
        code=__file__,
        told=[{"order": order, "num_examples": examples} for order, examples, _ in variants],
    )


def describe_addition(config: AdditionConfig, rows: Sequence[Row]) -> Findings:
    """Return what each order reached by size, examples and digits, and exact match as a product."""
    last = [row for row in rows if row["step"] == config.total_steps]
    table, summary, intervals = _by_setting(last)
    gap = [row["test/exact_match"] - row["test/product_of_accuracies"] for row in rows]
    mean, largest = float(np.mean(gap)), float(np.max(np.abs(gap)))
    summary["exact_match_minus_product"] = {"mean": mean, "largest": largest}
    text = (
        "Sums of numbers of fixed length, zeros in front, learnt from few examples with the sum "
        "written plain or reversed. Reversed, a digit needs two digits and a carry that is already "
        "there; plain, the first digit needs all of them. Exact match is held against the product "
        "of the accuracies of its digits: it would equal it if digits failed independently. It "
        f"differs by {mean:+.3f} on average and {largest:.3f} at most.\n\n"
        f"{apart_in_words(intervals)}"
    )
    digits, most = max(config.digits), max(config.num_examples)
    hardest = [row for row in rows if (row["digits"], row["num_examples"]) == (digits, most)]
    size = max(row["params"] for row in rows)
    of_largest = [row for row in hardest if row["params"] == size]
    by = lambda row: row["order"]  # noqa: E731
    tables = [table, changes_table(of_largest, x="step", measure="test", by=by)]
    if len(config.models) > 2:
        tables.append(
            forecasts_table(
                [row for row in hardest if row["step"] == config.total_steps],
                x="params",
                measure="test",
                by=by,
                answer_tokens=digits + 1,
                chance_of_token=0.1,
            )
        )
    section = Section("Addition", text, tuple(tables), tuple(_figures(config, rows)))
    return Findings(section, summary)


def _by_setting(last: Sequence[Row]) -> tuple[Table, dict[str, Any], dict[tuple, tuple]]:
    """Return the table of final scores by setting, the numbers behind it, and the intervals."""
    groups: dict[tuple, list[Row]] = {}
    for row in last:
        key = (row["digits"], row["model"], row["params"], row["num_examples"], row["order"])
        groups.setdefault(key, []).append(row)
    table, summary, intervals = [], {}, {}
    for key, found in sorted(groups.items()):
        exact = [row["test/exact_match"] for row in found]
        product, token, nats = (
            float(np.mean([row[f"test/{name}"] for row in found]))
            for name in ("product_of_accuracies", "token_accuracy", "answer_nats")
        )
        mean, low, high = mean_interval(exact)
        table.append((*key, mean, f"{low:.3f} to {high:.3f}", product, token, nats))
        intervals[key] = low, high
        summary["/".join(map(str, (f"{key[0]}digits", key[1], key[3], key[4])))] = {
            "exact_match": exact,
            "interval": (low, high),
            "product_of_accuracies": product,
        }
    columns = (
        "Digits", "Model", "Parameters", "Examples", "Order", "Exact match", "95% interval",
        "Product", "Token accuracy", "Nats",
    )  # fmt: skip
    caption = "Exact match of held-out sums: mean and Student-t interval over seeds."
    return Table(columns, tuple(table), caption), summary, intervals


def _figures(config: AdditionConfig, rows: Sequence[Row]) -> Iterator[Figure]:
    """Yield the most digits over training and, where there are several, by examples and by size."""
    digits, most = max(config.digits), max(config.num_examples)
    size = max(row["params"] for row in rows)
    hardest = [row for row in rows if row["digits"] == digits]
    last = [row for row in hardest if row["step"] == config.total_steps]

    def figure(name, shown, x, label, fixed, description, log=True) -> Figure:
        by = lambda row: row["order"]  # noqa: E731
        ends = ends_in_words(shown, x, "test/exact_match", by)
        return metrics_figure(
            f"addition-{name}",
            shown,
            measure="test",
            x=x,
            label=label,
            log=log,
            by=by,
            choices=10,
            answer_tokens=digits + 1,
            caption=f"{digits} digits, {fixed}; bands: range over seeds. Exact match: {ends}.",
            description=description,
        )

    yield figure(
        "training",
        [row for row in hardest if (row["num_examples"], row["params"]) == (most, size)],
        "step",
        "training step",
        f"{most:,} examples, the largest model",
        "Held-out sums over training, by order of the sum.",
        log=False,
    )
    if len(config.num_examples) > 1:
        yield figure(
            "examples",
            [row for row in last if row["params"] == size],
            "num_examples",
            "training examples",
            "the largest model, at the end of training",
            "Held-out sums by number of training examples, by order of the sum.",
        )
    if len(config.models) > 1:
        yield figure(
            "size",
            [row for row in last if row["num_examples"] == most],
            "params",
            "parameters",
            f"{most:,} examples, at the end of training",
            "Held-out sums by model size, by order of the sum.",
        )


def apart_in_words(intervals: Mapping[tuple, tuple[float, float]]) -> str:
    """Return where reversed sums lie above plain ones with disjoint intervals."""
    apart, compared = [], 0
    for (*where, order), (low, _) in intervals.items():
        if order == "reversed" and (*where, "plain") in intervals:
            compared += 1
            if low > intervals[(*where, "plain")][1]:
                digits, model, _, examples = where
                apart.append(f"{digits} digits, {model}, {examples:,} examples")
    if not compared:
        return ""
    found = "; ".join(apart) if apart else "none"
    return (
        f"Reversed lies above plain with disjoint 95% intervals in {len(apart)} of {compared} "
        f"settings: {found}."
    )
