"""The report of experiments/loss_perspective.py: scores against compute and against loss."""

from collections.abc import Mapping

import matplotlib.ticker
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from experiments import entry
from llm.evaluation.figures import as_figure
from llm.evaluation.report import Figure, Report, Section, Table, write_report
from llm.scaling.loss_perspective import PolynomialFit, ScoreTable

# Okabe and Ito 2008, its eight colours, for eight sizes; the yellow is darker, to be seen on white.
_COLOURS = (
    "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#b8a800", "#000000",
)  # fmt: skip
_MARKERS = "os^Dv"
_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 4.4

Fits = Mapping[str, Mapping[str, PolynomialFit]]  # by score, and by "compute" and "perplexity"


def write_loss_report(
    directory: epath.Path,
    table: ScoreTable,
    fits: Fits,
    *,
    source: str,
    perplexity: str,
    min_step: int,
    degree: int,
) -> None:
    """Write report.md and report.html with a table of R² and a figure for each score."""
    ahead = [
        name
        for name, by in fits.items()
        if by["perplexity"].held_out_r_squared > by["compute"].held_out_r_squared
    ]
    facts = {
        "checkpoints": f"{len(table.model)} of {len(set(table.model))} models",
        "steps": f"{min_step:,} and later",
        "loss foretells models left out better than compute": (
            f"{len(ahead)} of {len(fits)} scores" + (f": {', '.join(ahead)}" if ahead else "")
        ),
    }
    text = (
        f"Each score of {source} as a polynomial of degree {degree} in the log of training compute "
        f"(6 · parameters · tokens), and in the loss (the log of {perplexity}). Left out: the "
        "scores of each model by a polynomial of the other models', against the other models' mean."
    )
    figures = tuple(score_figure(table, name, fits[name], perplexity) for name in fits)
    sections = (
        Section("How well each tells the scores", text, (_table(fits),)),
        Section("Scores against compute and against loss", figures=figures),
    )
    command = entry.command_line()
    write_report(Report("Scores by compute and by loss", facts, sections, command), directory)


def _table(fits: Fits) -> Table:
    rows = [
        (
            name,
            f"log {predictor}",
            fit.r_squared,
            fit.adjusted_r_squared,
            fit.held_out_r_squared,
            fit.num_rows,
        )
        for name, by_predictor in fits.items()
        for predictor, fit in by_predictor.items()
    ]
    columns = ("score", "by", "R²", "adjusted R²", "R², models left out", "checkpoints")
    return Table(columns, tuple(rows), "Share of the scores' variance that each explains.")


def score_figure(
    table: ScoreTable, name: str, fits: Mapping[str, PolynomialFit], perplexity: str
) -> Figure:
    """Draw one score against compute and against loss, one colour for each size of model.

    Models of one size have markers of their own. The loss falls to the right, so that both panels
    rise.
    """
    drawing = Drawing(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    styles = _styles(table)
    models = np.array(table.model)
    for axes, x in ((left, np.exp(table.log_flops)), (right, table.log_perplexity)):
        for model, (colour, marker) in styles.items():
            mine = models == model
            axes.plot(
                x[mine],
                table.scores[name][mine],
                linestyle="",
                marker=marker,
                markersize=4,
                color=colour,
                markerfacecolor=colour if marker == _MARKERS[0] else "none",
                label=model.replace("$", r"\$"),
            )
    spans = {key: _span(x) for key, x in _predictors(table).items()}
    left.plot(np.exp(spans["compute"]), fits["compute"].at(spans["compute"]), **_LINE)
    right.plot(spans["perplexity"], fits["perplexity"].at(spans["perplexity"]), **_LINE)
    left.set_xscale("log")
    left.set_xlabel("training compute (FLOPs)")
    right.set_xlabel(f"loss (nats, log {perplexity})".replace("$", r"\$"))
    right.invert_xaxis()
    left.set_ylabel(f"{name} (score)".replace("$", r"\$"))
    for axes, predictor in ((left, "compute"), (right, "perplexity")):
        _finish(axes, f"R² = {fits[predictor].r_squared:.3f}")
    handles = left.get_legend_handles_labels()
    longest = max(map(len, handles[1])) * 4.8 + 42  # points, at size 8
    columns = max(1, int(72 * _WIDTH_INCHES / longest))
    drawing.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    described = (
        f"{name} of {len(styles)} models: a curve in log compute explains "
        f"{fits['compute'].r_squared:.1%} of its variance, in loss "
        f"{fits['perplexity'].r_squared:.1%}."
    )
    slug = "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in name)
    return as_figure(f"score-{slug}", drawing, described, described)


_LINE = {"color": "#555555", "linewidth": 1.4, "zorder": 1}


def _predictors(table: ScoreTable) -> dict[str, np.ndarray]:
    return {"compute": table.log_flops, "perplexity": table.log_perplexity}


def _span(x: np.ndarray) -> np.ndarray:
    return np.linspace(x.min(), x.max(), 200)


def _styles(table: ScoreTable) -> dict[str, tuple[str, str]]:
    """Return each model's colour, by size, and marker, by place among those of its size."""
    sizes = dict(zip(table.model, table.num_params.tolist(), strict=True))
    order = sorted(set(sizes.values()))
    styles, seen = {}, dict.fromkeys(order, 0)
    for model in sorted(sizes, key=lambda name: (sizes[name], name)):
        rank, size = order.index(sizes[model]), sizes[model]
        marker = seen[size] + rank // len(_COLOURS)
        styles[model] = (_COLOURS[rank % len(_COLOURS)], _MARKERS[marker % len(_MARKERS)])
        seen[size] += 1
    return styles


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
