"""The charts of a report, from the rows of metrics.jsonl and from bits per byte by predictor.

Drawn as SVG with text as outlines, so that they look the same on every screen and in print.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import EngFormatter, MaxNLocator

from llm.evaluation.report import Figure
from llm.evaluation.tables import PREDICTOR_LABELS, BitsPerByte, domains_of, predictors_of

# Okabe and Ito 2008, "Color universal design": told apart by the colour-blind as well. Its yellow
# is left out, for it is too faint on white.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, BLACK, GREY = "#56b4e9", "#cc79a7", "#000000", "#999999"
_CYCLE = (VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)  # blue is the training curve
_MARKERS = "osD^vP"

_WIDTH_INCHES, _HEIGHT_INCHES = 5.2, 4.0  # small, so that letters stay readable on a phone
_MAX_POINTS = 1500  # of a raw curve: more are finer than a pixel

MetricRows = Sequence[Mapping[str, float]]


def metric_series(rows: MetricRows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and finite values of one metric, in order; of a doubled step the last."""
    by_step = {row["step"]: row[name] for row in rows if name in row and "step" in row}
    steps = sorted(step for step, value in by_step.items() if np.isfinite(value))
    return np.array(steps, float), np.array([by_step[step] for step in steps], float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over a centred window; at the start it narrows, at the end it is cut.

    The start is steep, and a lopsided window would bend it; the end is flat and noisy.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    half = np.minimum(centre, window // 2)
    low, high = centre - half, np.minimum(centre + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def loss_figure(rows: MetricRows, *, tokens_per_step: float | None = None) -> Figure:
    """Draw the training loss, raw and smoothed, and each `eval/<domain>/loss`.

    The axis runs over steps, or over tokens where it is told how many a step has.
    """
    drawing, axes = draw()
    steps, losses = metric_series(rows, "train/loss")
    scale = tokens_per_step or 1.0
    if len(steps):
        thinned = slice(None, None, -(-len(steps) // _MAX_POINTS))
        axes.plot(steps[thinned] * scale, losses[thinned], color=SKY, alpha=0.45, linewidth=0.8)
        smoothed = smooth(losses, max(3, len(losses) // 50))
        axes.plot(steps * scale, smoothed, color=BLUE, linewidth=1.8, label="training, smoothed")
        # The first steps fall so fast and so far that they would flatten all the rest.
        top = smoothed[len(smoothed) // 50 : len(smoothed) // 50 + 1].max()
        low, high = smoothed.min(), max(top, losses[len(losses) // 4 :].max())
        axes.set_ylim(low - 0.08 * (high - low + 0.1), high + 0.04 * (high - low + 0.1))
    last = _plot_domains(axes, rows, "loss", scale)
    axes.set_ylabel("loss (nats per token)")
    _finish_curve(axes, tokens_per_step)
    description = f"Loss over {_span(steps)}; training ends at {_end(losses)}{last}."
    return as_figure("loss", drawing, description, "Loss of training and validation.")


def validation_figure(
    rows: MetricRows,
    *,
    baselines: Mapping[str, float] | None = None,
    tokens_per_step: float | None = None,
) -> Figure:
    """Draw each `eval/<domain>/bits_per_byte`, with `baselines` over all domains as level lines."""
    drawing, axes = draw()
    last = _plot_domains(axes, rows, "bits_per_byte", tokens_per_step or 1.0)
    for i, (name, value) in enumerate((baselines or {}).items()):
        style = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))[i % 4]
        label = PREDICTOR_LABELS.get(name, name)
        axes.axhline(value, color="#555555", linestyle=style, linewidth=1.1, label=label)
    axes.set_ylabel("validation (bits per byte)")
    _finish_curve(axes, tokens_per_step)
    caption = "Bits per byte of validation text in the course of training."
    return as_figure("validation", drawing, f"{caption[:-1]}{last}.", caption)


def learning_rate_figure(rows: MetricRows, *, tokens_per_step: float | None = None) -> Figure:
    """Draw the learning rate."""
    drawing, axes = draw(height=2.4)
    steps, rates = metric_series(rows, "train/learning_rate")
    axes.plot(steps * (tokens_per_step or 1.0), rates, color=BLUE, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    axes.set_ylabel("learning rate")
    _finish_curve(axes, tokens_per_step)
    peak = f"{rates.max():.3g}" if len(rates) else "nothing"
    description = f"Learning rate over {_span(steps)}; its peak is {peak}."
    return as_figure("learning-rate", drawing, description, "Learning rate.")


def bits_per_byte_figures(bits: BitsPerByte) -> tuple[Figure, ...]:
    """Draw one bar chart a domain, "all" first, on one scale: every predictor's bits per byte."""
    values = [x for by_domain in bits.values() for x in by_domain.values() if np.isfinite(x)]
    return tuple(
        _bar_figure(bits, domain, 1.18 * max(values, default=1.0)) for domain in domains_of(bits)
    )


def _bar_figure(bits: BitsPerByte, domain: str, limit: float) -> Figure:
    names = [name for name in predictors_of(bits) if np.isfinite(bits[name].get(domain, np.nan))]
    values = [bits[name][domain] for name in names]
    labels = [PREDICTOR_LABELS.get(name, name) for name in names]
    drawing, axes = draw(height=0.9 + 0.27 * len(names))
    bars = axes.barh(range(len(names)), values, height=0.72, color=list(map(_bar_colour, names)))
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=10)
    axes.set_yticks(range(len(names)), [_plain(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.xaxis.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_xlabel("bits per byte (less is better)")
    title = "all domains together" if domain == "all" else domain
    axes.set_title(_plain(title), loc="left", fontsize=11, fontweight="bold")
    listed = ", ".join(f"{label} {value:.3f}" for label, value in zip(labels, values, strict=True))
    slug = "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in domain)
    return as_figure(f"bits-per-byte-{slug}", drawing, f"Bits per byte, {title}: {listed}.")


def _bar_colour(name: str) -> str:
    if name == "model":
        return BLUE
    if name == "ngram":
        return GREEN
    return ORANGE if name.endswith("_given_training") else GREY


def _plot_domains(axes: Axes, rows: MetricRows, metric: str, scale: float) -> str:
    """Draw `eval/<domain>/<metric>` of every domain; return their last values in words."""
    domains = {
        name.split("/")[1]
        for row in rows
        for name in row
        if name.startswith("eval/") and name.endswith(f"/{metric}") and name.count("/") == 2
    }
    ends = []
    for i, domain in enumerate(sorted(domains, key=lambda name: (name != "all", name))):
        steps, values = metric_series(rows, f"eval/{domain}/{metric}")
        style = {"color": _CYCLE[i % len(_CYCLE)], "marker": _MARKERS[i % len(_MARKERS)]}
        label = _plain(f"validation: {domain}")
        axes.plot(steps * scale, values, linewidth=1.1, markersize=4, label=label, **style)
        ends.append(f", {label} ends at {_end(values)}")
    return "".join(ends)


def draw(height: float = _HEIGHT_INCHES) -> tuple[Drawing, Axes]:
    """Return an empty drawing and its axes, in the house's style."""
    drawing, (axes,) = draw_panels(1, height=height)
    return drawing, axes


def draw_panels(count: int, *, height: float | None = None) -> tuple[Drawing, list[Axes]]:
    """Return an empty drawing and so many axes side by side, in the house's style."""
    width = _WIDTH_INCHES if count == 1 else 0.62 * _WIDTH_INCHES * count
    height = height or (_HEIGHT_INCHES if count == 1 else 0.8 * _HEIGHT_INCHES)
    drawing = Drawing(figsize=(width, height), layout="constrained")
    panels = [drawing.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in panels:
        _style(axes)
    return drawing, panels


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    axes.xaxis.label.set_size(11)
    axes.yaxis.label.set_size(11)
    axes.set_axisbelow(True)


def _finish_curve(axes: Axes, tokens_per_step: float | None) -> None:
    axes.set_xlabel("training tokens" if tokens_per_step else "training step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        # Above the axes, where no curve can run through it.
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10)


def as_figure(name: str, drawing: Drawing, description: str, caption: str = "") -> Figure:
    """Return a finished drawing as the SVG of a report."""
    stream = io.StringIO()
    # A fixed salt and no date: the same numbers draw the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        FigureCanvasSVG(drawing).print_svg(stream, metadata={"Date": None, "Creator": None})
    return Figure(name, stream.getvalue(), description, caption)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a dollar sign as mathematics."""
    return text.replace("$", r"\$")


def _span(steps: np.ndarray) -> str:
    return f"steps {steps[0]:.0f} to {steps[-1]:.0f}" if len(steps) else "no steps"


def _end(values: np.ndarray) -> str:
    return f"{values[-1]:.3f}" if len(values) else "nothing"
