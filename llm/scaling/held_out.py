"""How well a law that saw only the smaller runs foretells the larger ones. Third floor."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from llm.scaling.runs import NotIdentifiableError, Runs, split_by_flops

Prediction = tuple[
    Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]
]  # value, low, high


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Predicted and measured, side by side, of runs (or budgets) that the fit did not see."""

    quantity: str  # "loss (nats per token)", "optimal parameters"
    flops: Float[np.ndarray, " R"]
    measured: Float[np.ndarray, " R"]
    predicted: Float[np.ndarray, " R"]
    low: Float[np.ndarray, " R"]
    high: Float[np.ndarray, " R"]
    num_fitted: int
    fitted_up_to_flops: float
    level: float

    def scores(self) -> dict[str, float]:
        """Return the errors: mean absolute, relative and signed, R², and the share in the interval.

        R² is 1 − Σ(predicted − measured)² / Σ(measured − mean)², negative where the mean of the
        held-out runs would have foretold them better; NaN for fewer than two.
        """
        error = self.predicted - self.measured
        around = ((self.measured - self.measured.mean()) ** 2).sum()
        inside = (self.low <= self.measured) & (self.measured <= self.high)
        known = np.isfinite(self.low) & np.isfinite(self.high)
        return {
            "num_runs": len(error),
            "mean_absolute_error": float(np.abs(error).mean()),
            "mean_relative_error": float(np.abs(error / self.measured).mean()),
            "mean_signed_error": float(error.mean()),
            "r_squared": float(1 - (error**2).sum() / around) if around > 0 else float("nan"),
            "share_in_interval": float(inside.mean()) if known.all() else float("nan"),
        }


def hold_out_loss(
    runs: Runs,
    fit_and_predict: Callable[[Runs, Runs], Prediction],
    *,
    fraction: float,
    level: float,
) -> HeldOut:
    """Fit to the runs without the largest `fraction` by FLOPs and foretell the loss of those.

    Raises:
      NotIdentifiableError: the smaller runs alone do not determine the law.
    """
    smaller, larger = split_by_flops(runs, fraction)
    if not len(smaller):
        raise NotIdentifiableError(
            "all runs are of one budget: none are smaller than the held-out ones"
        )
    try:
        predicted, low, high = fit_and_predict(smaller, larger)
    except NotIdentifiableError as error:
        raise NotIdentifiableError(
            f"without the largest {len(larger)} of {len(runs)} runs: {error}"
        ) from error
    return HeldOut(
        "loss (nats per token)",
        larger.flops,
        larger.loss,
        predicted,
        low,
        high,
        len(smaller),
        float(smaller.flops.max()),
        level,
    )
