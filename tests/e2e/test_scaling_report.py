"""The report of a ladder, from rows that follow a known law: it finds the law again."""

import json

import numpy as np
import pytest
from etils import epath

from configs.schema import ScalingConfig
from experiments.scaling_report import write_scaling_report
from llm.scaling.config import LadderConfig

E, A, B, ALPHA, BETA, R_STAR = 1.7, 400.0, 1200.0, 0.34, 0.32, 12.0
SIZES = (2e5, 4e5, 8e5, 1.6e6, 3.2e6, 6.4e6)
BUDGETS = (1e13, 3e13, 1e14, 3e14, 1e15)
TEXT = 1e12  # tokens that there are


def law(params, tokens, unique=TEXT):
    """Muennighoff et al. 2023, equation 5, for models no larger than their text needs."""
    unique = min(unique, tokens)
    repeats = tokens / unique - 1
    tokens = unique + unique * R_STAR * (1 - np.exp(-repeats / R_STAR))
    return E + A / params**ALPHA + B / tokens**BETA


def run_rows(ladder, params, tokens, budget, *, unique=TEXT, loss=None, rate=0.01, width=64):
    """Rows of a run that was evaluated four times."""
    name = f"{ladder}/{params:.0f}_{tokens:.0f}_{unique:.0f}_{rate}"
    for quarter in range(5):
        seen = tokens * quarter / 4
        now = loss if loss is not None else law(params, seen, unique) if quarter else 8.0
        yield {
            "ladder": ladder, "run": name, "depth": round(params), "width": width,
            "params": round(params), "parametrisation": "muP" if "mup" in ladder else "standard",
            "optimizer": "adamw", "learning_rate": rate, "budget": budget,
            "unique_tokens": round(unique), "regime": "repeated" if tokens > unique else "infinite",
            "step": quarter * 100, "final": quarter == 4, "tokens": seen, "epochs": seen / unique,
            "flops": 6 * params * seen, "source": "all", "loss": now, "train_loss": now,
            "in_context_score": -0.1 * quarter,
        }  # fmt: skip


def transfer_rows(ladder, best):
    """Runs whose loss is least at a rate that depends on the width."""
    for width, rate in best.items():
        for k in range(2, 12):
            loss = 3 + 0.05 * (np.log2(2.0**-k / rate)) ** 2
            yield from run_rows(ladder, 1e5 * width, 1e6, 1, loss=loss, rate=2.0**-k, width=width)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    rates = dict(
        depths=(1, 2), tokens=(10**6,), learning_rates=tuple(2.0**-k for k in range(2, 12))
    )
    ladders = {
        "isoflop": LadderConfig(flops=BUDGETS),
        "repeated": LadderConfig(tokens=(10**8,), unique_tokens=(None, 10**7, 10**6)),
        "standard": LadderConfig(**rates),
        "mup": LadderConfig(mup_base_depth=1, **rates),
    }
    config = ScalingConfig(ladders=ladders, bootstrap_draws=20)
    rows = [
        row
        for budget in BUDGETS
        for params in SIZES
        for row in run_rows("isoflop", params, budget / 6 / params, budget)
    ]
    for params in SIZES[:3]:
        for unique in (TEXT, 3e7, 1e7, 3e6, 1e6):
            rows += run_rows("repeated", params, 1e8, 1e8, unique=unique)
    rows += transfer_rows("standard", {32: 2.0**-5, 128: 2.0**-7})
    rows += transfer_rows("mup", {32: 2.0**-6, 128: 2.0**-6})
    workdir = epath.Path(tmp_path_factory.mktemp("report"))
    write_scaling_report(workdir, config, rows, {"total": 1.0})
    return workdir


def test_the_law_is_found_again(report):
    found = json.loads((report / "summary.json").read_text())["isoflop"]
    estimates = {name: x["value"] for name, x in found["parametric"]["estimates"].items()}
    expected = {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}
    assert {name: estimates[name] for name in expected} == pytest.approx(expected, rel=1e-2)
    exponent = BETA / (ALPHA + BETA)
    isoflop = found["isoflop"]["estimates"]["params_exponent"]["value"]
    assert isoflop == pytest.approx(exponent, abs=0.03)
    assert found["parametric"]["held_out"]["mean_relative_error"] < 1e-3


def test_what_a_repetition_is_worth_is_found_from_all_runs_trained_alike(report):
    found = json.loads((report / "summary.json").read_text())["repeated"]
    assert found["data_constrained"]["estimates"]["R_D_star"]["value"] == pytest.approx(
        R_STAR, rel=0.05
    )
    page = (report / "report.md").read_text()
    assert "ladders isoflop and repeated" in page


def test_learning_rates_are_read_off(report):
    best = json.loads((report / "summary.json").read_text())["best_learning_rates"]
    assert best["standard"] == pytest.approx({"32": 2.0**-5, "128": 2.0**-7})
    assert best["mup"] == pytest.approx({"32": 2.0**-6, "128": 2.0**-6})
    page = (report / "report.md").read_text()
    assert "standard -2.0, mup +0.0" in page


def test_every_figure_is_there_and_what_is_plotted_is_a_table(report):
    names = {file.stem for file in (report / "report_figures").iterdir()}
    assert names >= {
        "isoflop-loss-curves", "isoflop-in-context-score", "isoflop-parametric-surface",
        "isoflop-parametric-held-out", "repeated-repetition", "transfer-adamw",
    }  # fmt: skip
    lines = (report / "plotted.csv").read_text().splitlines()
    assert lines[0].replace('"', "") == "figure,series,x,y,low,high" and len(lines) > 100
