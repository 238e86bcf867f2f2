"""Curves of the studies of emergence: means over seeds with their range, metrics side by side."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator

from llm.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    as_figure,
    draw,
    draw_panels,
)
from llm.evaluation.report import Figure

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = "osD^vPX"
METRICS = {
    "exact_match": "exact match",
    "token_accuracy": "token accuracy",
    "answer_nats": "nats an answer",
}

_FEW_PLACES = 7  # whose labels do not run into each other

Rows = Sequence[Mapping[str, Any]]
Key = Callable[[Mapping[str, Any]], Hashable]


def curves(rows: Rows, x: str, y: str, by: Key) -> dict[Hashable, tuple[np.ndarray, np.ndarray]]:
    """Return by group the sorted values of x and, for each, those of y over seeds [X S].

    Seeds that lack a value leave a NaN.
    """
    found: dict[Hashable, dict[float, list[float]]] = {}
    for row in rows:
        if y in row:
            found.setdefault(by(row), {}).setdefault(row[x], []).append(row[y])
    series = {}
    for group, by_x in found.items():
        most = max(map(len, by_x.values()))
        places = sorted(by_x)
        values = [by_x[place] + [np.nan] * (most - len(by_x[place])) for place in places]
        series[group] = (np.array(places, float), np.array(values, float))
    return series


def ends_in_words(rows: Rows, x: str, y: str, by: Key) -> str:
    """Return where the mean of each group's share starts and ends."""
    means = {
        group: np.nanmean(values, axis=1) for group, (_, values) in curves(rows, x, y, by).items()
    }
    return ", ".join(f"{group} {mean[0]:.1%} to {mean[-1]:.1%}" for group, mean in means.items())


def plot_curves(
    axes: Axes, series: Mapping[Hashable, tuple[np.ndarray, np.ndarray]], *, markers: bool = False
) -> None:
    """Draw each group's mean, and the range over its seeds as a band."""
    for i, (group, (places, values)) in enumerate(series.items()):
        style = {"color": COLOURS[i % len(COLOURS)]}
        if markers:
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(places, np.nanmean(values, axis=1), linewidth=1.5, label=str(group), **style)
        low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
        axes.fill_between(places, low, high, alpha=0.2, linewidth=0, color=style["color"])
    axes.grid(True, color="#dddddd", linewidth=0.6)


def metrics_figure(
    name: str,
    rows: Rows,
    *,
    measure: str,
    x: str,
    label: str,
    by: Key,
    choices: int,
    answer_tokens: int,
    log: bool = False,
    caption: str,
    description: str,
) -> Figure:
    """Draw exact match, token accuracy and nats of one measure over x, side by side.

    A dotted line is a guess: each of the answer's tokens one of so many choices.
    """
    guess = {
        "exact_match": float(choices) ** -answer_tokens,
        "token_accuracy": 1 / choices,
        "answer_nats": answer_tokens * np.log(choices),
    }
    drawing, panels = draw_panels(len(METRICS))
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        plot_curves(axes, curves(rows, x, f"{measure}/{metric}", by), markers=log)
        axes.axhline(guess[metric], color="#555555", linestyle=":", linewidth=1, label="chance")
        axes.set_ylabel(title)
        axes.set_xlabel(label)
        if log:
            _mark_places(axes, sorted({row[x] for row in rows}))
        if metric != "answer_nats":
            axes.set_ylim(-0.03, 1.03)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10
    )
    return as_figure(name, drawing, description, caption)


def _mark_places(axes: Axes, places: Sequence[float]) -> None:
    """Make the axis logarithmic, with a tick at each place where there are few."""
    axes.set_xscale("log")
    if len(places) <= _FEW_PLACES:
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8)


def bars_figure(
    name: str,
    groups: Mapping[str, np.ndarray],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    description: str,
) -> Figure:
    """Draw bars side by side at 1, 2, 3, …, one of each group."""
    drawing, axes = draw()
    width = 0.8 / len(groups)
    for i, (group, heights) in enumerate(groups.items()):
        places = 1 + np.arange(len(heights)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(places, heights, width=width, color=COLOURS[i % len(COLOURS)], label=group)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.grid(True, color="#dddddd", linewidth=0.6)
    drawing.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    return as_figure(name, drawing, description, caption)


def lines_figure(
    name: str,
    series: Mapping[Hashable, tuple[np.ndarray, np.ndarray]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    caption: str,
    description: str,
) -> Figure:
    """Draw groups of curves on one pair of axes."""
    drawing, axes = draw()
    plot_curves(axes, series)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    drawing.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=10)
    return as_figure(name, drawing, description, caption)
