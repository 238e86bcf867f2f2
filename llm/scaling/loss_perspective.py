"""Scores as a function of loss, and of compute: which of the two tells them. Third floor.

Source: Du et al. 2024, arXiv:2403.15796: models of one loss score alike, whatever their size.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv
from etils import epath
from jaxtyping import Float, Int

from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN, NotIdentifiableError

_NAMED_ROWS = 5  # of the bad ones, in a message


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """R checkpoints: the model, its size, what it has read, its perplexity and its scores."""

    model: tuple[str, ...]  # of each checkpoint
    num_params: Float[np.ndarray, " R"]
    num_tokens: Float[np.ndarray, " R"]
    perplexity: Float[np.ndarray, " R"]
    scores: Mapping[str, Float[np.ndarray, " R"]]

    @property
    def log_flops(self) -> Float[np.ndarray, " R"]:
        """Return log(6·N·D)."""
        return np.log(FLOPS_PER_PARAM_TOKEN) + np.log(self.num_params) + np.log(self.num_tokens)

    @property
    def log_perplexity(self) -> Float[np.ndarray, " R"]:
        """Return the loss in nats, per whatever the perplexity is of."""
        return np.log(self.perplexity)

    @property
    def model_numbers(self) -> Int[np.ndarray, " R"]:
        return np.unique(np.array(self.model), return_inverse=True)[1]


@dataclasses.dataclass(frozen=True)
class PolynomialFit:
    """score = Σ coefficient · ((predictor − middle)/spread)^i."""

    coefficients: Float[np.ndarray, " K"]  # the constant first
    middle: float
    spread: float
    num_rows: int
    r_squared: float
    adjusted_r_squared: float
    held_out_r_squared: float  # of each model by the others; NaN if there is but one

    def at(self, predictor: Float[np.ndarray, " X"]) -> Float[np.ndarray, " X"]:
        scaled = (predictor - self.middle) / self.spread
        return np.polynomial.polynomial.polyval(scaled, self.coefficients)


def fit_score(
    predictor: Float[np.ndarray, " R"],
    score: Float[np.ndarray, " R"],
    model: Int[np.ndarray, " R"],
    *,
    degree: int = 3,
) -> PolynomialFit:
    """Fit a polynomial by least squares, with R², adjusted R², and R² of models left out in turn.

    R² is 1 − Σ(score − fit)²/Σ(score − mean)²; adjusted for its constants, each sum is over its
    degrees of freedom. Held out, the fit of a model's rows is by a polynomial of the other models'
    rows, and so is the mean: negative where the others' mean foretells better. Rows of one model
    are points of one training curve, so R² of the fit itself may flatter; that held out does not.

    Args:
      model: the number of each row's model. Numbers of sizes hold out all models of a size at once,
        where there are some (Pythia's sciq by compute: 0.729 in place of 0.745).

    Raises:
      NotIdentifiableError: there are not two rows more than constants, or fewer different values of
        the predictor than constants, or all scores are equal.
    """
    _check_rows(predictor, score, degree)
    middle, spread = float(predictor.mean()), float(predictor.std())
    powers = np.vander((predictor - middle) / spread, degree + 1, increasing=True)
    coefficients = np.linalg.lstsq(powers, score, rcond=None)[0]
    rest = ((score - powers @ coefficients) ** 2).sum()
    total = ((score - score.mean()) ** 2).sum()
    count = len(score)
    return PolynomialFit(
        coefficients,
        middle,
        spread,
        count,
        float(1 - rest / total),
        float(1 - rest / total * (count - 1) / (count - degree - 1)),
        _held_out(powers, score, model),
    )


def _held_out(
    powers: Float[np.ndarray, "R K"], score: Float[np.ndarray, " R"], model: Int[np.ndarray, " R"]
) -> float:
    rest = total = 0.0
    for number in np.unique(model):
        out = model == number
        if len(np.unique(powers[~out, 1])) < powers.shape[1]:
            return float("nan")
        others = np.linalg.lstsq(powers[~out], score[~out], rcond=None)[0]
        rest += ((score[out] - powers[out] @ others) ** 2).sum()
        total += ((score[out] - score[~out].mean()) ** 2).sum()
    return float(1 - rest / total)


def _check_rows(
    predictor: Float[np.ndarray, " R"], score: Float[np.ndarray, " R"], degree: int
) -> None:
    if degree < 1:
        raise ValueError(f"degree {degree}: it is 1 at least")
    if len(score) < degree + 3 or len(np.unique(predictor)) < degree + 1:
        raise NotIdentifiableError(
            f"{len(score)} rows with {len(np.unique(predictor))} different values: a polynomial of "
            f"degree {degree} needs {degree + 3} rows and {degree + 1} values"
        )
    if np.ptp(score) == 0:
        raise NotIdentifiableError(f"all {len(score)} scores are {score[0]:g}: nothing varies")


# ----------------------------------------------------------------------------------------- table


def load_scores(
    path: epath.PathLike,
    scores: Sequence[str],
    *,
    perplexity_column: str = "lambada_ppl",
    params_column: str = "params",
    tokens_column: str = "tokens",
    model_column: str = "model",
    step_column: str = "step",
    min_step: int = 0,
) -> ScoreTable:
    """Return the checkpoints of a CSV file at `min_step` and later.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no table, a column is missing (the nearest name is told), no row is left, or
        a cell of one is not a number (parameters, tokens and perplexity: a positive one).
    """
    positive = [params_column, tokens_column, perplexity_column]
    table = _read(epath.Path(path), [model_column, step_column, *positive, *scores])
    steps = _numbers(path, table, step_column, np.ones(len(table[step_column]), bool))
    kept = steps >= min_step
    if not kept.any():
        last = f"; the last is {steps.max():g}" if len(steps) else ": it has no rows"
        raise ValueError(f"{path}: no row has {step_column} ≥ {min_step}{last}")
    numbers = {}
    for name in (*positive, *scores):
        numbers[name] = _numbers(path, table, name, kept, positive=name in positive)
    return ScoreTable(
        tuple(np.array(table[model_column])[kept].tolist()),
        *(numbers[name] for name in positive),
        {name: numbers[name] for name in scores},
    )


def _read(path: epath.Path, columns: Sequence[str]) -> dict[str, list[str]]:
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(path.read_bytes()), pa.csv.ReadOptions(use_threads=False)
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no CSV table: {str(error)[:80]!a}") from error
    for name in columns:
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            listed = ", ".join(table.column_names)
            raise ValueError(f"{path} has no column {name!r}{hint} It has {listed}")
    return {name: [str(cell) for cell in table[name].to_pylist()] for name in columns}


def _numbers(
    path: epath.PathLike,
    table: Mapping[str, list[str]],
    column: str,
    kept: np.ndarray,
    *,
    positive: bool = False,
) -> Float[np.ndarray, " R"]:
    rows = np.flatnonzero(kept)
    values = np.array([_number(table[column][row]) for row in rows])
    bad = rows[~np.isfinite(values) | (positive & (values <= 0))]
    if len(bad):
        listed = ", ".join(str(row + 2) for row in bad[:_NAMED_ROWS])
        what = "positive number" if positive else "number"
        raise ValueError(
            f"{path}: {column} is no {what} in {len(bad)} rows ({listed}"
            f"{', …' if len(bad) > _NAMED_ROWS else ''}; the header is row 1), the first being "
            f"{table[column][bad[0]]!r}"
        )
    return values


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
