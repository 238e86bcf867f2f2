"""What the smaller models foretell of the larger ones, and how it came out. Third floor."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from llm.scaling.curve_laws import CurveLaw, LogisticLaw
from llm.scaling.runs import NotIdentifiableError


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Predicted and measured, one row for each run at or above the cut; or why there is none."""

    law: str
    cut: float
    num_fitted: int  # runs below the cut
    level: float
    x: Float[np.ndarray, " Q"]
    measured: Float[np.ndarray, " Q"]
    naive: float  # the mean of the largest fitted place
    predicted: Float[np.ndarray, " Q"]
    low: Float[np.ndarray, " Q"]
    high: Float[np.ndarray, " Q"]
    refused: str = ""

    @property
    def inside(self) -> Bool[np.ndarray, " Q"]:
        """Return whether each measured score lies within its prediction interval."""
        return (self.low <= self.measured) & (self.measured <= self.high)

    def scores(self) -> dict[str, float]:
        """Return errors: mean absolute and signed, the naive forecast's, the share in the interval.

        `skill` is 1 − error/naive error: 1 is perfect, below 0 it were better to expect no change.
        """
        error, naive = self.predicted - self.measured, np.abs(self.naive - self.measured).mean()
        absolute = np.abs(error).mean()
        return {
            "num_runs": len(error),
            "mean_absolute_error": float(absolute),
            "mean_signed_error": float(error.mean()),
            "naive_mean_absolute_error": float(naive),
            "skill": float(1 - absolute / naive) if naive > 0 else float("nan"),
            "share_in_interval": float("nan") if self.refused else float(self.inside.mean()),
        }


def forecast(
    x: Float[np.ndarray, " X"],
    y: Float[np.ndarray, "X S"],
    law: CurveLaw,
    *,
    cut: float,
    level: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> Forecast:
    """Fit a law to the places x < cut and foretell each run at the others.

    The interval is of one new run: the doubt about the constants and the noise of a run. Constants
    are refitted to curves drawn about the fit with normal noise, whose variance is itself drawn,
    as σ²·f/χ²(f): for a law that is linear in its constants this is Student's prediction
    interval exactly. σ² is the larger of the runs' mean square about the fit (f = runs − constants)
    and that of the places' means (f = places − constants): a law that misses the means by more
    than seeds explain is trusted less. But it knows nothing of a law that changes beyond the cut,
    or that fits below it and is wrong (the last row).

    Measured with 400 curves each, six places below the cut and three above (a factor 1,000 of size
    in all), noise 3% or 0.03, level 0.95: runs inside, with 1, 3 and 5 seeds.

    | law holds              | 1 seed | 3    | 5    |
    |------------------------|--------|------|------|
    | power law              | 0.95   | 0.97 | 0.97 |
    | power law with floor   | 0.93   | 0.97 | 0.97 |
    | logistic               | 0.94   | 0.97 | 0.97 |
    | logistic, hardly begun | 0.93   | 0.96 | 0.97 |
    | *wrong*: power law without floor, on a curve with one | 0.36 | 0.56 | 0.71 |

    Args:
      x: places, increasing; the log of size, compute or examples.
      y: scores of S seeds; NaN where one is missing.

    Raises:
      NotIdentifiableError: too few places below the cut, none above, or the law is not determined.
      ValueError: x does not increase, or a score is not one that the law can have.
    """
    rng = np.random.default_rng(seed)
    predicted, new_runs = _predict(x, y, law, cut, num_draws, rng)
    return _score(law.name, x, y, cut, predicted, new_runs, level)


def forecast_exact_match(
    x: Float[np.ndarray, " X"],
    token_accuracy: Float[np.ndarray, "X S"],
    exact_match: Float[np.ndarray, "X S"],
    *,
    answer_tokens: float,
    cut: float,
    law: CurveLaw | None = None,
    level: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> Forecast:
    """Foretell exact match as the forecast of token accuracy to the power of the answer's length.

    Exact match itself is not fitted: below the cut it may be 0 throughout. The interval has the
    doubt about token accuracy alone, none about the power: tokens that are right or wrong together
    give more exact matches.

    Raises: as `forecast`.

    Source: Schaeffer et al. 2023, arXiv:2304.15004, section 2.
    """
    law = law or LogisticLaw()
    rng = np.random.default_rng(seed)
    predicted, new_runs = _predict(x, token_accuracy, law, cut, num_draws, rng)
    name = f"{law.name} token accuracy to the power {answer_tokens:g}"
    powers = (each**answer_tokens for each in (predicted, new_runs))
    return _score(name, x, exact_match, cut, *powers, level)


def forecast_each(
    x: Float[np.ndarray, " X"],
    y: Float[np.ndarray, "X S"],
    laws: Sequence[CurveLaw],
    *,
    cut: float,
    **options,
) -> tuple[Forecast, ...]:
    """Return the forecast of each law; one that is not determined carries the reason, and NaN.

    Raises:
      ValueError: as `forecast`.
    """
    found = []
    for law in laws:
        try:
            found.append(forecast(x, y, law, cut=cut, **options))
        except NotIdentifiableError as error:
            level = options.get("level", 0.95)
            nothing = np.full(int((x >= cut).sum()), np.nan)
            empty = _score(law.name, x, y, cut, nothing, nothing[None], level)
            found.append(dataclasses.replace(empty, refused=str(error)))
    return tuple(found)


def _predict(
    x: Float[np.ndarray, " X"],
    y: Float[np.ndarray, "X S"],
    law: CurveLaw,
    cut: float,
    num_draws: int,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, "draws L"]]:
    """Return the score foretold at each of L larger places, and draws of one new run there."""
    if (np.diff(x) <= 0).any():
        raise ValueError("x must increase from place to place")
    small = x < cut
    constants = law.num_constants
    if small.sum() < constants + 1 or small.all():
        raise NotIdentifiableError(
            f"{small.sum()} places lie below the cut at {cut:g} and {(~small).sum()} above: "
            f"{law.name} needs {constants + 1} below, and one above to be scored"
        )
    scaled = law.to_scale(y[small])
    weights = (~np.isnan(scaled)).sum(1).astype(float)
    if not weights.all():
        raise ValueError(f"x = {x[small][weights == 0][0]:g} has no score")
    means = np.nansum(scaled, 1) / weights
    theta = law.fit(x[small], means[None], weights)
    fitted = law.predict(theta, x[small])[0]

    between = float(weights @ (means - fitted) ** 2)
    runs = between + float(np.nansum((scaled - means[:, None]) ** 2))
    candidates = [
        (between / (len(means) - constants), len(means) - constants),
        (runs / (weights.sum() - constants), weights.sum() - constants),
    ]
    variance, freedom = max(candidates)
    law.check(means, fitted, weights, variance)

    spread = np.sqrt(variance * freedom / rng.chisquare(freedom, num_draws))[:, None]
    curves = fitted + spread * rng.standard_normal((num_draws, len(means))) / np.sqrt(weights)
    drawn = law.predict(law.fit(x[small], curves, weights), x[~small])
    drawn = drawn + spread * rng.standard_normal(drawn.shape)
    predicted = law.predict(theta, x[~small])[0]
    return law.from_scale(predicted), law.from_scale(drawn)


def _score(
    name: str,
    x: Float[np.ndarray, " X"],
    y: Float[np.ndarray, "X S"],
    cut: float,
    predicted: Float[np.ndarray, " L"],
    new_runs: Float[np.ndarray, "draws L"],
    level: float,
) -> Forecast:
    low, high = np.quantile(new_runs, [(1 - level) / 2, (1 + level) / 2], axis=0)
    small = x < cut
    place, seed = np.nonzero(~np.isnan(y[~small]))
    naive = np.nanmean(y[small][-1]) if small.any() else np.nan
    return Forecast(
        name,
        cut,
        int((~np.isnan(y[small])).sum()),
        level,
        x[~small][place],
        y[~small][place, seed],
        float(naive),
        predicted[place],
        low[place],
        high[place],
    )
