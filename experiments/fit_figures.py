"""The drawings of a scaling-law report. Whatever is drawn is also kept as rows of a table."""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

from experiments.fit_summary import Analysis, number
from llm.evaluation.figures import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, as_figure, draw
from llm.evaluation.report import Figure
from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN, NotIdentifiableError

_COMPUTE = "training compute (FLOPs)"
_LOSS = "loss (nats per token)"
_LEVELS = 9  # lines of equal loss
_NARROW = 100.0  # a logarithmic axis with less from end to end needs more labels than powers of ten
_BUDGETS = 25  # at which a line of optima is worked out


@dataclasses.dataclass
class Plotted:
    """What was drawn: figure, series, x, y, low, high of every point."""

    rows: list[tuple[str, str, float, float, float, float]] = dataclasses.field(
        default_factory=list
    )

    def add(self, figure: str, series: str, x, y, low=None, high=None) -> None:
        """Keep the points of one series."""
        nothing = np.full(len(x), np.nan)
        low, high = (nothing if ends is None else ends for ends in (low, high))
        for values in zip(x, y, low, high, strict=True):
            self.rows.append((figure, series, *map(float, values)))


def figures_of(analysis: Analysis, plotted: Plotted) -> tuple[Figure, ...]:
    """Return the figures of a method, and keep their points in `plotted`."""
    figures = []
    match analysis.method:
        case "parametric" | "kaplan":
            figures += [surface_figure(analysis, plotted), residual_figure(analysis, plotted)]
        case "data_constrained":
            figures += [residual_figure(analysis, plotted), worth_figure(analysis, plotted)]
        case "isoflop":
            figures.append(parabola_figure(analysis, plotted))
        case "envelope":
            figures.append(curve_figure(analysis, plotted))
    allocation = allocation_figure(analysis, plotted)
    figures += [allocation] if allocation else []
    if analysis.held_out is not None:
        figures.append(held_out_figure(analysis, plotted))
    return tuple(figures)


def surface_figure(analysis: Analysis, plotted: Plotted) -> Figure:
    """Draw lines of equal fitted loss over compute and size, the runs, and the line of optima."""
    drawing, axes = draw()
    runs, fit = analysis.runs, analysis.fit
    law = fit.law if analysis.method == "kaplan" else fit.surface
    flops = np.geomspace(runs.flops.min() / 1.5, runs.flops.max() * 3, 120)
    sizes = np.geomspace(runs.num_params.min() / 1.5, runs.num_params.max() * 1.5, 120)
    grid_flops, grid_sizes = np.meshgrid(flops, sizes)
    tokens = grid_flops / (FLOPS_PER_PARAM_TOKEN * grid_sizes)
    loss = law.loss(grid_sizes.ravel(), tokens.ravel()).reshape(grid_sizes.shape)
    low, high = runs.loss.min(), runs.loss.max()
    levels = np.round(np.geomspace(low * 0.98, high, _LEVELS), 2)
    lines = axes.contour(flops, sizes, loss, levels=np.unique(levels), colors=GREY, linewidths=0.7)
    axes.clabel(lines, fontsize=8, fmt="%.2f", inline_spacing=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.scatter(runs.flops, runs.num_params, s=10, color=BLUE, alpha=0.7, label="runs")
    best = law.optimum(1.0)[0], law.params_exponent
    line = best[0] * flops ** best[1]
    axes.plot(flops, line, color=VERMILION, linewidth=1.8, label="least loss for the compute")
    axes.set_ylim(sizes[0], sizes[-1])
    axes.set_xlim(flops[0], flops[-1])
    _finish(axes, _COMPUTE, "parameters")
    plotted.add("surface", "runs", runs.flops, runs.num_params)
    plotted.add("surface", "least loss for the compute", flops, line)
    caption = (
        "Lines of equal fitted loss in nats per token. Where a vertical line of one budget touches "
        "the lowest of them, the model is the best for that compute."
    )
    text = (
        f"Fitted loss over compute and parameters with {len(runs)} runs; the best size grows as "
        f"compute to the power {number(float(best[1]))}."
    )
    return as_figure("surface", drawing, text, caption)


def residual_figure(analysis: Analysis, plotted: Plotted) -> Figure:
    """Draw how far the fit lies above or below each run, in percent of the loss."""
    drawing, axes = draw(height=3.2)
    runs, fit = analysis.runs, analysis.fit
    kept = getattr(fit, "kept", np.ones(len(runs), bool))
    flops, error = runs.flops[kept], 100 * np.expm1(fit.log_residuals)
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.scatter(flops, error, s=12, color=BLUE, alpha=0.7)
    axes.set_xscale("log")
    _finish(axes, _COMPUTE, "fitted less measured loss (%)")
    plotted.add("residuals", "runs", flops, error)
    middle, far = np.median(np.abs(error)), np.abs(error).max()
    left = f", {(~kept).sum()} outliers left out" if not kept.all() else ""
    return as_figure(
        "residuals",
        drawing,
        f"Residuals of {len(error)} runs over compute: half within {middle:.2g}%, the farthest "
        f"{far:.2g}% off{left}.",
        f"Residuals over compute: half of the runs lie within {middle:.2g}% of the fit. A trend "
        "would say that the law has another form.",
    )


def worth_figure(analysis: Analysis, plotted: Plotted) -> Figure:
    """Draw what repeated data are worth: effective over unique tokens, by epochs."""
    drawing, axes = draw(height=3.2)
    fit, runs = analysis.fit, analysis.runs
    most = float((runs.num_tokens / runs.unique_tokens).max())
    epochs = np.geomspace(1, max(most, 2.0), 80)

    def worth(scale: Float[np.ndarray, "draws 1"]) -> Float[np.ndarray, "draws 80"]:
        return 1 - scale * np.expm1(-(epochs - 1) / scale)

    value = worth(np.atleast_1d(fit.surface.repeat_scale)[:, None])[0]
    draws = worth(fit.draws.repeat_scale[:, None])
    ends = [(1 - fit.level) / 2, (1 + fit.level) / 2]
    low, high = np.quantile(draws, ends, axis=0) if len(draws) else (value, value)
    axes.plot(epochs, epochs, color=GREY, linestyle="--", linewidth=1.2, label="new tokens")
    axes.fill_between(epochs, low, high, color=SKY, alpha=0.35, linewidth=0)
    axes.plot(epochs, value, color=BLUE, linewidth=1.8, label="repeated tokens, fitted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, "epochs over the unique tokens", "worth (× unique tokens)")
    plotted.add("worth-of-repetition", "repeated tokens", epochs, value, low, high)
    return as_figure(
        "worth-of-repetition",
        drawing,
        f"Effective tokens over unique tokens by epochs: {value[-1]:.3g} at {epochs[-1]:.3g}.",
        f"What repetition is worth: {epochs[-1]:.3g} epochs count as {value[-1]:.3g} of new data.",
    )


def parabola_figure(analysis: Analysis, plotted: Plotted) -> Figure:
    """Draw the losses of each budget, their parabolas and the minima."""
    drawing, axes = draw()
    fit = analysis.fit
    colours = _ramp(len(fit.parabolas))
    for parabola, colour in zip(fit.parabolas, colours, strict=True):
        sizes = np.geomspace(parabola.sizes.min(), parabola.sizes.max(), 60)
        name = f"{number(parabola.flops)} FLOPs"
        axes.plot(parabola.sizes, parabola.loss, "o", color=colour, markersize=3.5, alpha=0.8)
        axes.plot(sizes, parabola.at(sizes), color=colour, linewidth=1.1)
        plotted.add("parabolas", name, parabola.sizes, parabola.loss)
        plotted.add("parabolas", f"{name}, parabola", sizes, parabola.at(sizes))
    best = np.array([p.size.value for p in fit.parabolas])
    least = np.array([p.least_loss.value for p in fit.parabolas])
    low, high = _ends([p.size for p in fit.parabolas], best)
    axes.errorbar(
        best,
        least,
        xerr=[best - low, high - best],
        fmt="D",
        color=VERMILION,
        markersize=4,
        linewidth=1.1,
        zorder=5,
        label=f"minima, {fit.level:.0%} intervals",
    )
    axes.set_xscale("log")
    axes.set_xlim(*_margin(np.concatenate([p.sizes for p in fit.parabolas])))
    what = "parameters" if fit.variable == "params" else "training tokens"
    _finish(axes, what, _LOSS)
    plotted.add("parabolas", f"minima (x: {what}, low and high of x)", best, least, low, high)
    first, last = fit.parabolas[0], fit.parabolas[-1]
    return as_figure(
        "parabolas",
        drawing,
        f"Loss over {what} at {len(fit.parabolas)} budgets from {number(first.flops)} to "
        f"{number(last.flops)} FLOPs; the best goes from {number(best[0])} to {number(best[-1])}.",
        f"One parabola a budget, from {number(first.flops)} FLOPs (dark) to {number(last.flops)} "
        "(light)"
        + (f"; {len(fit.refused)} more have no minimum to report." if fit.refused else "."),
    )


def curve_figure(analysis: Analysis, plotted: Plotted) -> Figure:
    """Draw the training curves and the envelope under them."""
    drawing, axes = draw()
    fit = analysis.fit
    for curve, colour in zip(fit.curves, _ramp(len(fit.curves)), strict=True):
        axes.plot(curve.flops, curve.loss, color=colour, linewidth=0.9, alpha=0.8)
        plotted.add("envelope", f"{number(curve.num_params)} parameters", curve.flops, curve.loss)
    axes.plot(fit.flops, fit.loss, ".", color=VERMILION, markersize=3, label="envelope")
    plotted.add("envelope", "envelope", fit.flops, fit.loss)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes, _COMPUTE, _LOSS)
    sizes = [curve.num_params for curve in fit.curves]
    return as_figure(
        "envelope",
        drawing,
        f"Loss of {len(fit.curves)} sizes from {number(sizes[0])} to {number(sizes[-1])} parameters"
        f" over compute; {len(np.unique(fit.best))} of them are the best somewhere between others.",
        "Training curves from the smallest model (dark) to the largest (light), and the least loss "
        "at each compute where smaller and larger models were trained as well.",
    )


def allocation_figure(analysis: Analysis, plotted: Plotted) -> Figure | None:
    """Draw the best parameters and tokens over compute, with the band of their intervals."""
    runs, fit = analysis.runs, analysis.fit
    highest = max([10 * runs.flops.max(), *(o.flops for o in analysis.optima)])
    flops = np.geomspace(runs.flops.min(), highest, _BUDGETS)
    try:
        optima = [fit.optimum(budget) for budget in flops]
    except NotIdentifiableError:
        return None
    drawing, axes = draw()
    for series, colour, name in (
        ("num_params", BLUE, "parameters"),
        ("num_tokens", ORANGE, "tokens"),
    ):
        estimates = [getattr(optimum, series) for optimum in optima]
        value = np.array([x.value for x in estimates])
        low, high = _ends(estimates, value)
        axes.fill_between(flops, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(flops, value, color=colour, linewidth=1.8, label=f"best {name}")
        plotted.add("allocation", f"best {name}", flops, value, low, high)
    _draw_measured(axes, analysis, plotted)
    axes.axvline(runs.flops.max(), color=GREY, linestyle=":", linewidth=1.2, label="largest run")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, _COMPUTE, "parameters, tokens")
    exponents = fit.estimates()
    words = ""
    if "params_exponent" in exponents:
        words = f" as compute to the power {number(exponents['params_exponent'].value)}"
    end = optima[-1]
    return as_figure(
        "allocation",
        drawing,
        f"The best parameters{words} and tokens over compute; at {number(end.flops)} FLOPs "
        f"{number(end.num_params.value)} parameters and {number(end.num_tokens.value)} tokens.",
        f"The best model for a budget, with {fit.level:.0%} intervals. Right of the dotted line "
        "the law is extrapolated.",
    )


def _draw_measured(axes: Axes, analysis: Analysis, plotted: Plotted) -> None:
    """Mark what the line of optima was fitted to, where it was fitted to optima."""
    fit = analysis.fit
    if analysis.method == "isoflop":
        flops = np.array([p.flops for p in fit.parabolas])
        best = np.array([p.size.value for p in fit.parabolas])
        low, high = _ends([p.size for p in fit.parabolas], best)
        colour = BLUE if fit.variable == "params" else ORANGE
        bars = [best - low, high - best]
        axes.errorbar(flops, best, yerr=bars, fmt="o", color=colour, markersize=3.5, linewidth=0.9)
        plotted.add("allocation", "minima of parabolas", flops, best, low, high)
    if analysis.method == "envelope":
        axes.plot(fit.flops, fit.num_params, ".", color=GREEN, markersize=3, label="envelope")
        plotted.add("allocation", "envelope", fit.flops, fit.num_params)


def held_out_figure(analysis: Analysis, plotted: Plotted) -> Figure:
    """Draw what the fit to smaller runs foretold against what was measured."""
    drawing, axes = draw()
    held_out = analysis.held_out
    measured, predicted = held_out.measured, held_out.predicted
    low = np.where(np.isfinite(held_out.low), held_out.low, predicted)
    high = np.where(np.isfinite(held_out.high), held_out.high, predicted)
    bars = [np.maximum(predicted - low, 0), np.maximum(high - predicted, 0)]
    ends = np.array(_margin(np.concatenate([measured, low, high])))
    axes.plot(ends, ends, color="#555555", linewidth=0.9, label="predicted = measured")
    axes.errorbar(
        measured,
        predicted,
        yerr=bars,
        fmt="o",
        color=BLUE,
        ecolor=SKY,
        markersize=3.5,
        linewidth=0.9,
        label=f"held out, {held_out.level:.0%} intervals",
    )
    logarithmic = ends[1] > 10 * ends[0]
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xscale="log" if logarithmic else "linear", yscale="log" if logarithmic else "linear")
    if not logarithmic and ends[1] > 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(axes, f"measured {held_out.quantity}", "predicted")
    plotted.add("held-out", "x measured, y predicted", measured, predicted, low, high)
    scores = held_out.scores()
    average = " on average" if scores["num_runs"] > 1 else ""
    words = (
        f"{scores['num_runs']} held out, up to {number(held_out.flops.max())} FLOPs: off by "
        f"{scores['mean_relative_error']:.2%}{average}, by a fit up to "
        f"{number(held_out.fitted_up_to_flops)} FLOPs."
    )
    return as_figure("held-out", drawing, f"Predicted against measured: {words}", words)


# --- Style ---


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_xscale() == "log":  # labels of the small ticks run into each other
        low, high = axes.get_xlim()
        if high / low < _NARROW:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(LogFormatterSciNotation())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color="#dddddd", linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10)


def _ramp(count: int) -> Sequence[tuple[float, ...]]:
    """Return colours from dark to light for things in order, told apart by the colour-blind too."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))


def _ends(estimates: Sequence, value: Float[np.ndarray, " X"]) -> Float[np.ndarray, "2 X"]:
    """Return the ends of intervals, the values themselves where there are none."""
    ends = np.array([[x.low, x.high] for x in estimates]).T
    return np.where(np.isfinite(ends), ends, value)


def _margin(values: Float[np.ndarray, " X"]) -> tuple[float, float]:
    logs = np.log(values)
    room = 0.04 * (np.ptp(logs) + 1e-3)
    return float(np.exp(logs.min() - room)), float(np.exp(logs.max() + room))
