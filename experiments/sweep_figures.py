"""The drawings of a sweep: the metric over steps, over each field, and parallel coordinates."""

import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from experiments.sweep_results import Result
from llm.evaluation.figures import BLUE, GREY, as_figure, draw, metric_series
from llm.evaluation.report import Figure

_LOG_FROM = 8.0  # the ratio of largest to smallest from which an axis is logarithmic
_MOST_TICKS = 6


def measured(results: Sequence[Result]) -> list[Result]:
    """Return the results that have a finite value of the metric."""
    return [each for each in results if each.value is not None and math.isfinite(each.value)]


def curves_figure(
    results: Sequence[Result], metric: str, goal: str, rungs: Sequence[int]
) -> Figure:
    """Draw the metric of every member over its steps; `results` are the best first."""
    drawing, axes = draw()
    colours = rank_colours(len(results))
    for i, result in reversed(list(enumerate(results))):
        steps, values = metric_series(result.rows, metric)
        style = {"color": BLUE, "linewidth": 2.2} if i == 0 else {"color": colours[i]}
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, marker=marker, markersize=3, **{"linewidth": 1.0} | style)
        if result.state.startswith("stopped") and len(steps):
            axes.plot(steps[-1], values[-1], marker="x", color=style["color"], markersize=7)
    for step in rungs:
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1.0)
    axes.set_xlabel("training step")
    axes.set_ylabel(metric)
    axes.set_xlim(left=0)
    axes.set_ylim(*_limits([x for result in results for x in _settled(result, metric)], goal))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    best = results[0]
    ended = " A cross: stopped there. Dotted: rungs." if rungs else ""
    caption = f"{metric} of every member; blue is the best, {best.member.name}. Lighter is worse."
    description = (
        f"{metric} over steps of {len(results)} members; the best ends at {best.value:.4g}."
    )
    return as_figure("curves", drawing, description, caption + ended)


def field_figure(results: Sequence[Result], field: str, metric: str, goal: str) -> Figure:
    """Draw the metric over one field; the other fields' spread is what points of a value show."""
    drawing, axes = draw(height=3.2)
    found = [result for result in results if field in result.member.fields]
    values = [result.member.fields[field] for result in found]
    places, ticks = _scale(axes, values)
    metrics = [result.value for result in found]
    done = [result.state == "done" for result in found]
    for place, value, whole in zip(places, metrics, done, strict=True):
        style = {} if whole else {"fillstyle": "none"}
        axes.plot(place, value, marker="o", color=BLUE, alpha=0.75, markersize=6, **style)
    pick = min if goal == "min" else max
    groups: dict[float, list[float]] = {}
    for place, value in zip(places, metrics, strict=True):
        groups.setdefault(place, []).append(value)
    if 1 < len(groups) < len(found):
        line = sorted((place, pick(each)) for place, each in groups.items())
        axes.plot(*zip(*line, strict=True), color=GREY, linewidth=1.2, zorder=1.5)
    axes.set_xlabel(field)
    axes.set_ylabel(metric)
    axes.set_ylim(*_limits(metrics, goal))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    best = found[metrics.index(pick(metrics))].member.fields[field]
    caption = (
        f"{metric} over {field}, the other fields mixed; the grey line joins the best of each."
    )
    numbers = sorted({value for value in values if _is_number(value)})
    if len(numbers) > 2 and best in (numbers[0], numbers[-1]):
        caption += f" The best, {format_value(best)}, is at an end: values beyond it may be better."
    if not all(done):
        caption += " Hollow: stopped or not finished."
    description = f"{metric} over {field} ({ticks}); the best member has {format_value(best)}."
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", field)
    return as_figure(f"field-{slug}", drawing, description, caption)


def parallel_figure(
    results: Sequence[Result], fields: Sequence[str], metric: str, goal: str
) -> Figure:
    """Draw each member as a line through its fields and its metric; `results` best first."""
    width = max(5.2, 1.5 * (len(fields) + 1))
    drawing = Drawing(figsize=(width, 3.8), layout="constrained")
    axes = drawing.add_subplot()
    columns = [_Column([result.member.fields.get(field) for result in results]) for field in fields]
    columns.append(
        _Column([result.value for result in results], _limits([r.value for r in results], goal))
    )
    heights = np.array([column.heights for column in columns]).T
    colours = rank_colours(len(results))
    for i, line in reversed(list(enumerate(heights))):
        style = {"color": BLUE, "linewidth": 2.6} if i == 0 else {"color": colours[i]}
        axes.plot(range(len(columns)), line, **{"linewidth": 1.2} | style)
    for x, column in enumerate(columns):
        axes.axvline(x, color="#555555", linewidth=1.0)
        for height, text in column.ticks():
            axes.annotate(
                text, (x, height), (5, 0), textcoords="offset points", va="center", fontsize=9,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
            )  # fmt: skip
    names = [field.replace(".", ".\n") for field in fields] + [metric.replace("/", "/\n")]
    axes.set_xticks(range(len(columns)), names, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.1, len(columns) - 0.6)
    best = results[0]
    caption = (
        f"Every member through its fields to its {metric}; blue is the best. Lighter is worse."
    )
    description = (
        f"Parallel coordinates of {len(results)} members over {', '.join(fields)} and {metric}; "
        f"the best is {best.member.name} with {best.value:.4g}."
    )
    return as_figure("parallel-coordinates", drawing, description, caption)


class _Column:
    """One axis of parallel coordinates: where values lie on it, from 0 to 1."""

    def __init__(self, values: Sequence[Any], limits: tuple[float, float] | None = None):
        self._texts: dict[float, str] = {}
        numbers = [value for value in values if _is_number(value)]
        if len(numbers) == len([v for v in values if v is not None]) and numbers:
            low, high = limits or (min(numbers), max(numbers))
            log = limits is None and low > 0 and high / low >= _LOG_FROM
            form = math.log if log else float
            span = form(high) - form(low) or 1.0

            def height(value: Any) -> float:
                if value is None:
                    return -0.12  # a member without the field, below the axis
                return min(1.0, max(0.0, (form(value) - form(low)) / span))

            shown = sorted(set(numbers))
            if len(shown) > _MOST_TICKS or limits:
                places = np.linspace(form(low), form(high), 5)
                round_ones = [x for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high]
                shown = [float(f"{math.exp(x):.2g}") for x in places] if log else round_ones
            self._texts = {height(value): format_value(float(value)) for value in shown}
        else:
            known = sorted({format_value(v) for v in values if v is not None})

            def height(value: Any) -> float:
                if value is None:
                    return -0.12
                return known.index(format_value(value)) / max(1, len(known) - 1)

            self._texts = {i / max(1, len(known) - 1): text for i, text in enumerate(known)}
        self.heights = [height(value) for value in values]
        if any(value is None for value in values):
            self._texts[-0.12] = "–"

    def ticks(self) -> list[tuple[float, str]]:
        """Return the heights that are labelled, with their texts."""
        return list(self._texts.items())


def _scale(axes: Axes, values: Sequence[Any]) -> tuple[list[float], str]:
    """Set the x axis for values of a field; return where each lies, and the span in words."""
    if not all(map(_is_number, values)):
        known = sorted({format_value(value) for value in values})
        axes.set_xticks(range(len(known)), known)
        axes.set_xlim(-0.5, len(known) - 0.5)
        return [float(known.index(format_value(value))) for value in values], ", ".join(known)
    numbers = sorted({float(value) for value in values})
    if numbers[0] > 0 and numbers[-1] / numbers[0] >= _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(numbers) <= _MOST_TICKS:
        axes.set_xticks(numbers, [format_value(number) for number in numbers])
        axes.xaxis.set_minor_locator(NullLocator())
    return [
        float(value) for value in values
    ], f"{format_value(numbers[0])} to {format_value(numbers[-1])}"


def _settled(result: Result, metric: str) -> list[float]:
    """Return the metric past the first fifth of a member's steps, whose fall would flatten all."""
    steps, values = metric_series(result.rows, metric)
    return list(values[steps >= steps[-1] / 5])


def rank_colours(count: int) -> list[Any]:
    """Return a colour for each place, from the best to the worst: dark to light."""
    scale = matplotlib.colormaps["viridis"]
    return [(*scale(0.2 + 0.65 * i / max(1, count - 1))[:3], 0.8) for i in range(count)]


def format_value(value: Any, digits: int = 4) -> str:
    """Return a field's value as a figure or a table shows it."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    text = "–" if value is None else str(value)
    return text if len(text) <= 24 else text[:21] + "…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _limits(values: Sequence[float], goal: str) -> tuple[float, float]:
    """Return limits that show the good half of the values well: those that diverged lie outside."""
    if goal == "max":
        low, high = _limits([-value for value in values], "min")
        return -high, -low
    low, middle, high = min(values), float(np.median(values)), max(values)
    high = min(high, middle + 4 * (middle - low)) if middle > low else high
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin
