"""Intervals by resampling, and what every law reports with them. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

Draws = Float[np.ndarray, "*draws"] | float  # a constant: one number, or one for each draw


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval; NaN ends where no interval can be had."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The model and data of least loss for a budget."""

    flops: float
    num_params: Estimate
    num_tokens: Estimate
    tokens_per_param: Estimate
    loss: Estimate | None = None


def resample(
    runs: Int[np.ndarray, " R"], num_draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws R"]:
    """Return how often each row counts in each draw: whole runs drawn with replacement.

    Rows of one run (points of one training curve) share their noise, so they are drawn or left out
    together; where each row is a run of its own, this is the usual bootstrap of rows, as Besiroglu
    et al. 2024 use it. Rows and not residuals, for the noise of a table differs with size.
    """
    names, group = np.unique(runs, return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), num_draws)
    return counts[:, group].astype(float)


def estimate(
    value: float | Float[np.ndarray, ""], draws: Float[np.ndarray, " draws"], level: float
) -> Estimate:
    """Return a value with its percentile interval: `level` of the draws lie inside."""
    if len(draws) == 0:
        return Estimate(float(value))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def optimum_of(
    flops: float,
    point: tuple[float, float],
    draws: tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]],
    level: float,
    loss: Estimate | None = None,
) -> Optimum:
    """Return an optimum from the parameters and tokens of the fit and of its draws."""
    (num_params, num_tokens), (params_draws, tokens_draws) = point, draws
    return Optimum(
        float(flops),
        estimate(num_params, params_draws, level),
        estimate(num_tokens, tokens_draws, level),
        estimate(num_tokens / num_params, tokens_draws / params_draws, level),
        loss,
    )
