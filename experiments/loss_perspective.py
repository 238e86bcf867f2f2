"""Is a score told by a model's loss or by its compute? Polynomials of each, with R² and a report.

    python -m experiments.loss_perspective --csv=pythia.csv --min_step=1000 [--output=DIR] [--json]
    python -m experiments.loss_perspective --csv=mine.csv --scores=acc --perplexity_column=val_ppl

A row is a checkpoint: its model, parameters N, step, tokens D, perplexity and scores. Compute is
6·N·D, loss the log of the perplexity. R² of models left out in turn says what a model's scores are
worth foretelling from the others'. The two panels of the report's figures are the claim of Du et
al. 2024 (arXiv:2403.15796): against loss, models of every size lie on one curve.
"""

import dataclasses
from typing import Any

from absl import flags
from etils import epath

from experiments import entry
from llm.scaling.loss_perspective import PolynomialFit, ScoreTable, fit_score, load_scores

_CSV = flags.DEFINE_string("csv", None, "The table of checkpoints.", required=True)
_SCORES = flags.DEFINE_list("scores", ["arc_easy", "piqa", "sciq"], "Columns of scores.")
_PERPLEXITY = flags.DEFINE_string("perplexity_column", "lambada_ppl", "The column of perplexity.")
_PARAMS = flags.DEFINE_string("params_column", "params", "The column of parameters.")
_TOKENS = flags.DEFINE_string("tokens_column", "tokens", "The column of tokens read.")
_MODEL = flags.DEFINE_string("model_column", "model", "The column of the model's name.")
_STEP = flags.DEFINE_string("step_column", "step", "The column of the training step.")
_MIN_STEP = flags.DEFINE_integer("min_step", 1, "Only checkpoints of this step and later.", 0)
_DEGREE = flags.DEFINE_integer("degree", 3, "Of the polynomials.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "A folder for report.md, report.html and figures.")
_JSON = entry.define_json()


def main() -> None:
    scores = [name.strip() for name in _SCORES.value]
    if not scores or len(set(scores)) < len(scores):
        raise ValueError(f"--scores={','.join(scores)}: give one column at least, each once")
    table = load_scores(
        epath.Path(_CSV.value),
        scores,
        perplexity_column=_PERPLEXITY.value,
        params_column=_PARAMS.value,
        tokens_column=_TOKENS.value,
        model_column=_MODEL.value,
        step_column=_STEP.value,
        min_step=_MIN_STEP.value,
    )
    fits = {name: _fits(table, name) for name in scores}
    if _OUTPUT.value:
        from experiments.loss_perspective_report import write_loss_report  # only now: matplotlib

        write_loss_report(
            epath.Path(_OUTPUT.value),
            table,
            fits,
            source=_CSV.value,
            perplexity=_PERPLEXITY.value,
            min_step=_MIN_STEP.value,
            degree=_DEGREE.value,
        )
    if _JSON.value:
        entry.print_json(_as_json(table, fits))
        return
    print(f"{len(table.model)} checkpoints of {len(set(table.model))} models")
    print(f"{'R² by a polynomial of degree ' + str(_DEGREE.value):40}fit    adjusted  left out")
    for name, by_predictor in fits.items():
        for predictor, fit in by_predictor.items():
            values = (fit.r_squared, fit.adjusted_r_squared, fit.held_out_r_squared)
            listed = "".join(f"{value:<9.3f}" for value in values)
            print(f"{name + ' by log ' + predictor:40}{listed.rstrip()}")
    if _OUTPUT.value:
        print(f"wrote {_OUTPUT.value}/report.html and report.md")


def _fits(table: ScoreTable, name: str) -> dict[str, PolynomialFit]:
    predictors = {"compute": table.log_flops, "perplexity": table.log_perplexity}
    return {
        predictor: fit_score(x, table.scores[name], table.model_numbers, degree=_DEGREE.value)
        for predictor, x in predictors.items()
    }


def _as_json(table: ScoreTable, fits: dict[str, dict[str, PolynomialFit]]) -> dict[str, Any]:
    return {
        "csv": _CSV.value,
        "num_rows": len(table.model),
        "num_models": len(set(table.model)),
        "min_step": _MIN_STEP.value,
        "degree": _DEGREE.value,
        "scores": {
            name: {f"log_{x}": dataclasses.asdict(fit) for x, fit in by_predictor.items()}
            for name, by_predictor in fits.items()
        },
    }


if __name__ == "__main__":
    entry.run(main)
