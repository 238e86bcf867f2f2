"""Addition of several digits: the order of the sum's digits decides how many examples it takes."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from configs.schema import EmergenceConfig
from experiments.phenomena.changes import changes_table, forecasts_table
from experiments.phenomena.common import (
    Findings,
    Row,
    answers_of,
    mean_interval,
    read_rows,
    stacked,
    train_group,
    transformer,
)
from experiments.phenomena.figures import metrics_figure
from llm.data.synthetic.addition import addition_split, drawn_from
from llm.data.synthetic.batches import TaskBatches
from llm.evaluation.report import Section, Table
from llm.models.config import TransformerConfig
from llm.scaling.emergence_config import AdditionConfig
from llm.training.members import Member


def train_addition(
    config: AdditionConfig, common: EmergenceConfig, workdir: epath.Path
) -> list[Row]:
    """Train each size on each number of digits; orders, numbers of examples, seeds together."""
    rows = []
    for digits, (name, shape) in itertools.product(config.digits, config.models.items()):
        rows += _train_size(config, common, workdir / f"{name}_{digits}digits", digits, name, shape)
    return rows


def _train_size(
    config: AdditionConfig,
    common: EmergenceConfig,
    workdir: epath.Path,
    digits: int,
    name: str,
    shape: TransformerConfig,
) -> list[Row]:
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
    facts = {"model": name, "params": trainable.num_params, "digits": digits}
    train_group(
        workdir,
        common,
        config,
        trainable,
        members,
        TaskBatches(
            [drawn_from(train) for train, _ in splits],
            [member.data_seed for member in members],
            config.batch_sequences,
        ),
        {"test": (answers_of(model), stacked([held_out for _, held_out in splits]))},
        tokens_per_step=splits[0][0].weights.shape[1] * config.batch_sequences,
        facts=facts,
    )
    told = [{"order": order, "num_examples": examples} for order, examples, _ in variants]
    return read_rows(workdir, members, facts, told)


def describe_addition(config: AdditionConfig, rows: Sequence[Row]) -> Findings:
    """Return what each order reached by size, examples and digits, and exact match as a product."""
    last = [row for row in rows if row["step"] == config.total_steps]
    groups: dict[tuple, list[Row]] = {}
    for row in last:
        key = (row["digits"], row["model"], row["params"], row["num_examples"], row["order"])
        groups.setdefault(key, []).append(row)
    table, summary, intervals = [], {}, {}
    for key, found in sorted(groups.items()):
        exact = np.array([row["test/exact_match"] for row in found])
        product = np.mean([row["test/product_of_accuracies"] for row in found])
        token = np.mean([row["test/token_accuracy"] for row in found])
        nats = np.mean([row["test/answer_nats"] for row in found])
        mean, low, high = mean_interval(exact)
        table.append((*key, mean, f"{low:.3f} to {high:.3f}", product, token, nats))
        intervals[key] = low, high
        summary["/".join(map(str, (f"{key[0]}digits", key[1], key[3], key[4])))] = {
            "exact_match": exact.tolist(),
            "interval": (low, high),
            "product_of_accuracies": float(product),
        }
    gap = [row["test/exact_match"] - row["test/product_of_accuracies"] for row in rows]
    summary["exact_match_minus_product"] = {
        "mean": float(np.mean(gap)),
        "largest": float(np.max(np.abs(gap))),
    }
    digits = max(config.digits)
    largest = max(row["params"] for row in rows)
    most = max(config.num_examples)
    shown = [row for row in rows if row["digits"] == digits and row["params"] == largest]
    common = dict(measure="test", choices=10, answer_tokens=digits + 1, by=lambda row: row["order"])
    bands = "bands: range over seeds."
    figures = [
        metrics_figure(
            "addition-training",
            [row for row in shown if row["num_examples"] == most],
            x="step",
            label="training step",
            caption=f"{digits} digits, {most} examples, the largest model; {bands}",
            description=f"Held-out sums of {digits} digits over training, by order of the sum.",
            **common,
        )
    ]
    if len(config.num_examples) > 1:
        figures.append(
            metrics_figure(
                "addition-examples",
                [row for row in shown if row["step"] == config.total_steps],
                x="num_examples",
                label="training examples",
                log=True,
                caption=f"{digits} digits, the largest model, at the end of training; {bands}",
                description="Held-out sums by number of training examples, by order of the sum.",
                **common,
            )
        )
    if len(config.models) > 1:
        figures.append(
            metrics_figure(
                "addition-size",
                [r for r in last if r["digits"] == digits and r["num_examples"] == most],
                x="params",
                label="parameters",
                log=True,
                caption=f"{digits} digits, {most} examples, at the end of training; {bands}",
                description="Held-out sums by model size, by order of the sum.",
                **common,
            )
        )
    text = (
        "Sums of numbers of fixed length, zeros in front, learnt from few examples with the sum "
        "written plain or reversed. Reversed, a digit needs two digits and a carry that is already "
        "there; plain, the first digit needs all of them. Exact match is held against the product "
        "of the accuracies of its digits: it would equal it if digits failed independently. It "
        f"differs by {np.mean(gap):+.3f} on average and {np.max(np.abs(gap)):.3f} at most.\n\n"
        f"{apart_in_words(intervals)}"
    )
    columns = (
        "Digits", "Model", "Parameters", "Examples", "Order", "Exact match", "95% interval",
        "Product", "Token accuracy", "Nats",
    )  # fmt: skip
    changes = changes_table(
        [row for row in shown if row["num_examples"] == most],
        x="step",
        measure="test",
        by=lambda row: row["order"],
    )
    caption = "Exact match of held-out sums: mean and Student-t interval over seeds."
    tables = [Table(columns, tuple(table), caption), changes]
    if len(config.models) > 2:
        tables.append(
            forecasts_table(
                [r for r in last if r["digits"] == digits and r["num_examples"] == most],
                x="params",
                measure="test",
                by=lambda row: row["order"],
                answer_tokens=digits + 1,
                chance_of_token=0.1,
            )
        )
    section = Section("Addition", text, tuple(tables), tuple(figures))
    return Findings(section, summary)


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
