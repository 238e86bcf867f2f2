"""Change points of the studies' curves, and forecasts of their larger models, as tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.phenomena.common import Row
from experiments.phenomena.figures import METRICS, Key, curves
from llm.evaluation.report import Table
from llm.scaling.change_points import find_change_point
from llm.scaling.curve_laws import LogisticLaw, PowerLaw
from llm.scaling.forecasts import Forecast, forecast, forecast_exact_match
from llm.scaling.runs import NotIdentifiableError


def changes_table(
    rows: Sequence[Row],
    *,
    x: str,
    measure: str,
    by: Key,
    others: Mapping[str, str] | None = None,
) -> Table:
    """Return where each group's curve over log x changes, by metric; nats are taken as logs.

    `others` are columns beside the metrics of the measure, and what they are called. Over steps the
    points of a curve are one run each, and are drawn together.
    """
    columns = {f"{measure}/{metric}": title for metric, title in METRICS.items()} | (others or {})
    table = []
    for column, title in columns.items():
        for group, (places, values) in curves(rows, x, column, by).items():
            table.append((str(group), title, change_in_words(places, values, column, x)))
    caption = (
        f"A knee or step over log {x}, if no line, cubic, sigmoid or power law explains the curve "
        "as well (5% false alarms at most); in brackets its 95% interval."
    )
    return Table(("Runs", "Metric", "Change point"), tuple(table), caption)


def change_in_words(places: np.ndarray, values: np.ndarray, column: str, x: str) -> str:
    """Return the change point of one curve [X S], or why there is none to report."""
    kept = (places > 0) & ~np.isnan(values).all(axis=1)
    places, values = places[kept], values[kept]
    if column.endswith("answer_nats"):
        values = np.log(np.maximum(values, 1e-6))
    if np.ptp(np.nanmean(values, axis=1)) < 1e-9:
        return "constant"
    try:
        found = find_change_point(np.log(places), values, joint=x == "step")
    except (NotIdentifiableError, ValueError) as error:
        return f"not told: {error}"
    return found.describe(x, np.exp)


def forecasts_table(
    rows: Sequence[Row],
    *,
    x: str,
    measure: str,
    by: Key,
    answer_tokens: int,
    chance_of_token: float,
) -> Table:
    """Return what the smaller models foretell of the largest one: by a power law for nats, by a
    logistic between chance and 1 for token accuracy, and exact match as that to the power of the
    answer's length."""
    table = []
    accuracy = LogisticLaw(chance=chance_of_token)
    by_metric = {m: curves(rows, x, f"{measure}/{m}", by) for m in METRICS}
    for group, (places, nats) in by_metric["answer_nats"].items():
        tokens, exact = (by_metric[m][group][1] for m in ("token_accuracy", "exact_match"))
        log_x = np.log(places)
        options = {"cut": float(log_x[-1])}
        attempts = {
            "nats an answer": lambda a=(log_x, nats), o=options: forecast(*a, PowerLaw(), **o),
            "token accuracy": lambda a=(log_x, tokens), o=options: forecast(*a, accuracy, **o),
            "exact match": lambda a=(log_x, tokens, exact), o=options: forecast_exact_match(
                *a, answer_tokens=answer_tokens, law=accuracy, **o
            ),
        }
        for metric, attempt in attempts.items():
            try:
                table.append((str(group), metric, *_forecast_cells(attempt())))
            except (NotIdentifiableError, ValueError) as error:
                table.append((str(group), metric, f"not told: {error}", None, None, None))
    columns = ("Runs", "Metric", "Foretold", "Measured", "Error", "Error of no change")
    caption = "The largest model, from the smaller ones; in brackets the 95% prediction interval."
    return Table(columns, tuple(table), caption)


def _forecast_cells(found: Forecast) -> tuple[str, float, float, float]:
    scores = found.scores()
    told = f"{found.predicted[0]:.3f} ({found.low[0]:.3f} to {found.high[0]:.3f})"
    error, naive = scores["mean_absolute_error"], scores["naive_mean_absolute_error"]
    return told, float(np.mean(found.measured)), error, naive
