"""Fit a scaling law to a table of training runs: constants, the best model for a budget, errors.

    python -m experiments.fit --csv=runs.csv [--budget=1e21] [--output=DIR] [--json]
    python -m experiments.fit --csv=runs.csv --method=isoflop --isoflop_variable=tokens
    python -m experiments.fit --csv=curves.parquet --method=envelope --run_column=name
    python -m experiments.fit --csv=table.csv --params_column='Model Size' --flops_column=FLOP

A row is a model of N parameters after D tokens, and its loss; any two of N, D and C = 6·N·D are
enough. Methods: parametric (L = E + A/N^α + B/D^β), isoflop, envelope (Hoffmann et al. 2022),
kaplan (2020), data_constrained (Muennighoff et al. 2023; needs unique tokens). A table that does
not determine a law is refused with what is missing, exit code 2.
"""

import dataclasses
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from experiments import entry
from experiments.fit_methods import METHODS, FitOptions, analyse
from experiments.fit_summary import Analysis, number, show
from llm.scaling.parametric import Outliers
from llm.scaling.robust import HUBER_DELTA
from llm.scaling.table import load_runs

_CSV = flags.DEFINE_string("csv", None, "The table: CSV (, ; or tab) or Parquet.", required=True)
_METHOD = flags.DEFINE_enum(
    "method",
    "parametric",
    METHODS,
    "Which law is fitted.",
)
_COLUMNS = {
    quantity: flags.DEFINE_string(f"{quantity}_column", None, f"The column of {words}.")
    for quantity, words in {
        "params": "parameters; default: guessed, as are the others",
        "tokens": "training tokens",
        "flops": "training FLOPs",
        "loss": "the loss",
        "unique_tokens": "unique training tokens",
        "run": "the names of runs: rows of one name are one training curve; never guessed",
    }.items()
}
_UNITS = {
    quantity: flags.DEFINE_float(f"{quantity}_unit", None, f"What a {quantity} cell is times.", 0.0)
    for quantity in ("params", "tokens", "flops", "unique_tokens")
}
_LOSS_UNIT = flags.DEFINE_enum(
    "loss_unit", "nats", ["nats", "bits", "perplexity"], "What the loss is in, per token."
)
_WHERE = flags.DEFINE_multi_string(
    "where", [], "Only rows of this value: column=value; repeatable, all must hold."
)
_MAX_BAD = flags.DEFINE_float(
    "max_bad_fraction", 0.1, "Of the rows that may be skipped for a bad cell.", 0.0, 1.0
)
_BUDGET = flags.DEFINE_multi_float(
    "budget", [], "FLOPs to find the best model for; default: the largest run's and 10 times that."
)
_UNIQUE = flags.DEFINE_float(
    "unique_tokens", float("inf"), "How many there are, for data_constrained budgets.", 1.0
)
_OUTLIERS = flags.DEFINE_string(
    "outliers",
    "none",
    "parametric: none; auto (log loss over 5 robust deviations off); a number, of the farthest "
    "off; highest:number, of the highest losses (Besiroglu et al. 2024).",
)
_DELTA = flags.DEFINE_float("huber_delta", HUBER_DELTA, "Of log loss.", 1e-12)
_ALL_STARTS = flags.DEFINE_boolean(
    "all_starts", False, "parametric: all 4,500 starts of Hoffmann et al., not 500 of them."
)
_VARIABLE = flags.DEFINE_enum(
    "isoflop_variable", "params", ["params", "tokens"], "What the parabolas are of, in its log."
)
_ISOFLOP_BUDGETS = flags.DEFINE_multi_float(
    "isoflop_budget", [], "A budget of the table, in FLOPs; repeatable; default: found in it."
)
_TOLERANCE = flags.DEFINE_float(
    "budget_tolerance", 0.1, "How far off a run may be, relative.", 1e-6, 0.9
)
_DRAWS = flags.DEFINE_integer("bootstrap", 500, "Resamples for the intervals; 0: none.", 0)
_LEVEL = flags.DEFINE_float("level", 0.95, "Of the intervals.", 0.01, 0.999)
_HOLD_OUT = flags.DEFINE_float(
    "holdout_fraction",
    0.2,
    "Of the runs (or budgets), the largest, foretold by a fit without them; 0: none.",
    0.0,
    0.9,
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same intervals.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "A folder for report.md, report.html, their figures and plotted.csv."
)
_JSON = entry.define_json()

_FEW_DRAWS = 100  # 95% intervals of fewer are mostly luck


def main() -> None:
    columns = {name: flag.value for name, flag in _COLUMNS.items() if flag.value is not None}
    outliers = _parse_outliers(_OUTLIERS.value)
    budgets = _check_budgets("--budget", _BUDGET.value)
    loaded = load_runs(
        epath.Path(_CSV.value),
        columns=columns,
        units={name: _unit(name) for name, flag in _UNITS.items() if flag.value is not None},
        loss_unit=_LOSS_UNIT.value,
        where=[_parse_where(text) for text in _WHERE.value],
        max_bad_fraction=_MAX_BAD.value,
    )
    runs, notes = loaded.runs, list(loaded.notes)
    if _METHOD.value != "envelope" and len(np.unique(runs.run)) < len(runs):
        ends = runs.ends()
        notes.append(f"the last rows of {len(ends)} runs are used; {len(runs)} rows in all")
        runs = ends
    if 0 < _DRAWS.value < _FEW_DRAWS:
        notes.append(f"{_DRAWS.value} resamples are few for intervals; {_FEW_DRAWS} at least")

    far = [budget for budget in budgets if budget > 1000 * runs.flops.max()]
    notes.extend(
        f"{number(budget)} FLOPs are {budget / runs.flops.max():,.0f} times the largest run: "
        "far beyond what the runs show, and no interval tells of a law that changes"
        for budget in far
    )
    analysis = analyse(
        _METHOD.value, _CSV.value, runs, _options(outliers), budgets=budgets, notes=notes
    )
    if _OUTPUT.value:
        from experiments.fit_report import write_fit_report  # only now: it loads the model code

        write_fit_report(epath.Path(_OUTPUT.value), analysis)
    if _JSON.value:
        entry.print_json(_as_json(analysis, loaded.num_bad_rows))
        return
    show(analysis)
    if _OUTPUT.value:
        print(f"wrote {_OUTPUT.value}/report.html, report.md and plotted.csv")


# --- Flags ---


def _options(outliers: Outliers) -> FitOptions:
    return FitOptions(
        num_draws=_DRAWS.value,
        level=_LEVEL.value,
        seed=_SEED.value,
        holdout_fraction=_HOLD_OUT.value,
        delta=_DELTA.value,
        outliers=outliers,
        all_starts=_ALL_STARTS.value,
        variable=_VARIABLE.value,
        budgets=tuple(_check_budgets("--isoflop_budget", _ISOFLOP_BUDGETS.value)) or None,
        tolerance=_TOLERANCE.value,
        unique_tokens=_UNIQUE.value,
    )


def _parse_outliers(text: str) -> Outliers:
    if text in ("none", "auto"):
        return text
    rule, _, count = text.rpartition(":")
    if rule in ("", "highest") and count.isascii() and count.isdigit():
        return ("highest", int(count)) if rule else int(count)
    raise ValueError(f"--outliers={text}: it is none, auto, a number, or highest:number")


def _parse_where(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--where={text}: it is column=value")
    return column, value


def _unit(name: str) -> float:
    unit = _UNITS[name].value
    if not 0 < unit < float("inf"):
        raise ValueError(f"--{name}_unit={unit}: it is a positive number, as 1e6 or 1e9")
    return unit


def _check_budgets(flag: str, budgets: list[float]) -> list[float]:
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise ValueError(f"{flag}={budget}: FLOPs are a positive number, as 1e21")
    return list(budgets)


# --- JSON ---


def _as_json(analysis: Analysis, num_bad_rows: int) -> dict[str, Any]:
    fit, held_out = analysis.fit, analysis.held_out
    report = {
        "csv": analysis.source,
        "method": analysis.method,
        "num_rows": len(analysis.runs),
        "num_bad_rows": num_bad_rows,
        "level": fit.level,
        "num_draws": _DRAWS.value,
        "estimates": {name: dataclasses.asdict(x) for name, x in fit.estimates().items()},
        "optima": [dataclasses.asdict(optimum) for optimum in analysis.optima],
        "notes": analysis.notes,
    }
    if held_out is not None:
        report["held_out"] = {
            "quantity": held_out.quantity,
            "num_fitted": held_out.num_fitted,
            "fitted_up_to_flops": held_out.fitted_up_to_flops,
            **held_out.scores(),
        }
    match analysis.method:
        case "isoflop":
            report["variable"] = fit.variable
            report["scatter_of_log_size"] = fit.line.scatter if fit.line else None
            report["budgets"] = [
                {"flops": p.flops, "num_runs": len(p.sizes), "size": p.size, "loss": p.least_loss}
                for p in fit.parabolas
            ]
            report["refused_budgets"] = [
                {"flops": r.flops, "num_runs": len(r.sizes), "reason": r.reason}
                for r in fit.refused
            ]
            report["budgets"] = [
                {name: _plain(value) for name, value in row.items()} for row in report["budgets"]
            ]
        case "envelope":
            report["num_curves"] = len(fit.curves)
        case _:
            report["objective"] = fit.objective
            report["starts"] = dataclasses.asdict(fit.starts)
    if analysis.method == "kaplan":
        report["single_laws"] = [dataclasses.asdict(law) for law in fit.single]
    if analysis.method == "parametric":
        report["outlier_rows"] = analysis.runs.row[~fit.kept]
    return report


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


if __name__ == "__main__":
    entry.run(main)
