"""A power law through the best sizes at several budgets, and what scatters them. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class PowerLine:
    """size = e^log_coefficient · C^exponent, and its draws (log coefficient, exponent)."""

    log_coefficient: float
    exponent: float
    draws: Float[np.ndarray, "draws 2"]
    scatter: float  # of log size about the line, beyond the noise of each; a standard deviation

    def at(self, flops: float) -> tuple[float, Float[np.ndarray, " draws"]]:
        """Return the size for a budget, and its draws."""
        log_flops = np.log(flops)
        value = np.exp(self.log_coefficient + self.exponent * log_flops)
        return float(value), np.exp(self.draws @ np.array([1.0, log_flops]))


def fit_power_line(
    flops: Float[np.ndarray, " budgets"],
    sizes: Float[np.ndarray, " budgets"],
    size_draws: Float[np.ndarray, "draws budgets"],
    rng: np.random.Generator,
) -> PowerLine:
    """Fit log size over log FLOPs by least squares, all budgets alike, as Hoffmann et al. do.

    (Weighted by their own precision, the minima of the shared table foretell its larger budgets
    worse: 28% off in place of 23%.)

    The minima of real tables lie off a line by more than the noise of their losses explains. That
    scatter, the mean square of the residuals (over budgets less 2) less the mean variance of the
    draws, is drawn along with them: a random-effects model by the method of moments. With two
    budgets there are no draws, for nothing tells whether they lie on a line.
    """
    x, y = np.log(flops), np.log(sizes)
    inverse = np.linalg.pinv(np.stack([np.ones_like(x), x], -1))
    line = inverse @ y
    if len(x) < 3 or not len(size_draws):
        return PowerLine(float(line[0]), float(line[1]), np.zeros((0, 2)), 0.0)
    logs = np.log(size_draws)
    # From the middle 68%: a minimum that is hardly one has a few draws far away.
    noise = np.subtract(*np.quantile(logs, [0.84, 0.16], axis=0)) / 2
    residual = y - line[0] - line[1] * x
    excess = (residual**2).sum() / (len(x) - 2) - (noise**2).mean()
    scatter = float(np.sqrt(max(excess, 0.0)))
    drawn = (logs + scatter * rng.normal(size=logs.shape)) @ inverse.T
    return PowerLine(float(line[0]), float(line[1]), drawn, scatter)
