"""The drawings of a ladder that no fit is needed for: curves, learning rates, repetition."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import EngFormatter

from experiments.phenomena.figures import COLOURS, MARKERS
from llm.evaluation.figures import BLACK, as_figure, draw, draw_panels
from llm.evaluation.report import Figure

Rows = Sequence[Mapping[str, Any]]


def curves_figure(rows: Rows) -> Figure:
    """Draw the loss of every run over the FLOPs that it took, and the least at each."""
    drawing, axes = draw()
    sizes = sorted({row["params"] for row in rows})
    colours = size_colours(sizes)
    points = []
    for run in dict.fromkeys(row["run"] for row in rows):
        found = [row for row in rows if row["run"] == run and row["step"] > 0]
        flops, loss = [row["flops"] for row in found], [row["loss"] for row in found]
        axes.plot(flops, loss, color=colours[found[0]["params"]], linewidth=0.9)
        points += [(*point, found[0]["params"]) for point in zip(flops, loss, strict=True)]
    points.sort()
    flops = np.array([point[0] for point in points])
    least = np.minimum.accumulate([point[1] for point in points])
    axes.plot(flops, least, color=BLACK, linewidth=1.4, linestyle="--", label="least so far")
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel("held-out loss (nats per token)")
    size_bar(drawing, axes, sizes)
    axes.legend(frameon=False, fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    description = (
        f"Held-out loss over compute of {len(sizes)} sizes, {sizes[0]:,} to {sizes[-1]:,}."
    )
    return as_figure("loss-curves", drawing, description, envelope_in_words(points))


def envelope_in_words(points: Sequence[tuple[float, float, int]]) -> str:
    """Return what points of (FLOPs, loss, parameters), by FLOPs, show of the least loss."""
    best, least = [], np.inf
    for flops, loss, size in points:
        if loss < least:
            least = loss
            best.append((flops, loss, size))
    if not best:
        return ""
    (first, _, small), (last, loss, large) = best[len(best) // 10], best[-1]
    return (
        f"Every run, and the compute envelope: the least loss is of {small:,} parameters at "
        f"{first:.1e} FLOPs and of {large:,} at {last:.1e}, where it is {loss:.3f}."
    )


def transfer_figure(optimizer: str, ladders: Mapping[str, Rows]) -> Figure:
    """Draw the final loss over the learning rate by width, one panel a ladder."""
    drawing, panels = draw_panels(len(ladders))
    for axes, (name, rows) in zip(panels, ladders.items(), strict=True):
        for i, width in enumerate(sorted({row["width"] for row in rows})):
            rates, losses = rate_curve([row for row in rows if row["width"] == width])
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(rates, losses, markersize=4, linewidth=1.3, label=f"width {width}", **style)
            best = int(np.nanargmin(losses))
            axes.plot(rates[best], losses[best], markersize=10, fillstyle="none", **style)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate")
        axes.set_title(f"{name}: {rows[0]['optimizer']}, {rows[0]['parametrisation']}", fontsize=10)
        axes.grid(True, color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("held-out loss (nats per token)")
    low = min(ax.get_ylim()[0] for ax in panels)
    high = max(_shown(rows) for rows in ladders.values())
    for axes in panels:
        axes.set_ylim(low, high)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10
    )
    description = "Final loss over learning rate by width: " + "; ".join(
        f"{name}, best at {', '.join(f'{r:.3g}' for r in best_rates(rows).values())}"
        for name, rows in ladders.items()
    )
    moved = ", ".join(f"{name} {octaves(rows):+.1f}" for name, rows in ladders.items())
    caption = (
        "Rings mark each width's best rate. From the narrowest model to the widest it moves by so "
        f"many factors of two: {moved}."
    )
    return as_figure(f"transfer-{optimizer}", drawing, description + ".", caption)


def octaves(rows: Rows) -> float:
    """Return by how many factors of two the best rate of the widest lies above the narrowest's."""
    found = best_rates(rows)
    return float(np.log2(found[max(found)] / found[min(found)]))


def rate_curve(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return learning rates and the mean final loss of each over seeds."""
    rates = sorted({row["learning_rate"] for row in rows})
    losses = [np.mean([r["loss"] for r in rows if r["learning_rate"] == rate]) for rate in rates]
    return np.array(rates), np.array(losses)


def best_rates(rows: Rows) -> dict[int, float]:
    """Return by width the learning rate of least loss: the minimum of a parabola in log rate
    through the best rate and its neighbours, or the best rate itself at an end."""
    found = {}
    for width in sorted({row["width"] for row in rows}):
        rates, losses = rate_curve([row for row in rows if row["width"] == width])
        best = int(np.nanargmin(losses))
        found[width] = float(rates[best])
        if 0 < best < len(rates) - 1 and np.isfinite(losses[best - 1 : best + 2]).all():
            x, y = np.log(rates[best - 1 : best + 2]), losses[best - 1 : best + 2]
            a, b, _ = np.polyfit(x, y, 2)
            found[width] = float(np.exp(-b / (2 * a)))
    return found


def in_context_figure(rows: Rows) -> Figure:
    """Draw the in-context score over training tokens: of each size its longest run."""
    drawing, axes = draw()
    sizes = sorted({row["params"] for row in rows})
    colours = size_colours(sizes)
    ends = []
    for size in sizes:
        ours = [row for row in rows if row["params"] == size and row["step"] > 0]
        longest = max(ours, key=lambda row: row["tokens"])["run"]
        found = sorted((row for row in ours if row["run"] == longest), key=lambda r: r["tokens"])
        scores = [row["in_context_score"] for row in found]
        style = {"color": colours[size], "marker": "o", "markersize": 3, "linewidth": 1.1}
        axes.plot([row["tokens"] for row in found], scores, **style)
        ends.append(scores[-1])
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("late less early loss (nats per token)")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    size_bar(drawing, axes, sizes)
    caption = (
        f"Below 0 context helps. At the end of each size's longest run: {ends[0]:.2f} for "
        f"{sizes[0]:,} parameters, {ends[-1]:.2f} for {sizes[-1]:,}."
    )
    description = f"In-context score over training tokens of {len(sizes)} sizes."
    return as_figure("in-context-score", drawing, description, caption)


def size_colours(sizes: Sequence[int]) -> dict[int, Any]:
    """Return a colour for each size, by the log of it."""
    norm = matplotlib.colors.LogNorm(sizes[0], sizes[-1])
    return {n: matplotlib.colormaps["viridis"](0.85 * float(norm(n))) for n in sizes}


def size_bar(drawing, axes, sizes: Sequence[int]) -> None:
    """Draw beside the axes which colour is which size."""
    colours = matplotlib.colors.ListedColormap(
        matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, 256))
    )
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.LogNorm(sizes[0], sizes[-1]), colours)
    drawing.colorbar(scale, ax=axes, label="parameters")


def repetition_figure(rows: Rows) -> Figure:
    """Draw held-out and training loss over tokens, by how much text there was, a panel a size."""
    sizes = sorted({row["params"] for row in rows})
    drawing, panels = draw_panels(len(sizes))
    for axes, size in zip(panels, sizes, strict=True):
        ours = [row for row in rows if row["params"] == size and row["step"] > 0]
        for i, unique in enumerate(sorted({row["unique_tokens"] for row in ours}, reverse=True)):
            found = [row for row in ours if row["unique_tokens"] == unique]
            found.sort(key=lambda row: row["tokens"])
            tokens, colour = [row["tokens"] for row in found], COLOURS[i % len(COLOURS)]
            label = f"{unique:,} tokens, {found[-1]['epochs']:.1f} times"
            losses = [row["loss"] for row in found]
            axes.plot(tokens, losses, color=colour, label=label, marker="o", ms=3)
            trained = [row["train_loss"] for row in found]
            axes.plot(tokens, trained, color=colour, linestyle=":", linewidth=1.1)
        axes.set_title(f"{size:,} parameters", fontsize=10)
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(True, color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("loss (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    caption = "Held-out (solid) and training loss (dotted), by how much text was repeated."
    return as_figure("repetition", drawing, "Loss over tokens by amount of text.", caption)


def _shown(rows: Rows) -> float:
    """Return a loss up to which curves are worth showing: rates that diverge go beyond."""
    losses = np.array([row["loss"] for row in rows])
    losses = losses[np.isfinite(losses)]
    return float(np.min(losses) + 3 * (np.median(losses) - np.min(losses)))
