"""Simple laws of a score over the log of size, compute or steps, fitted to many curves at once.

Third floor. A law is fitted by least squares in the scale in which its noise is alike everywhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from llm.scaling.runs import NotIdentifiableError

_MAX_ITERATIONS = 50
_TOLERANCE = 1e-8  # of what is left over, that a step must gain
_STUCK = 1e6  # damping at which nothing is gained
_LONGEST_STEP = 1.0
_FAR_BELOW = 12.0  # e-folds under the least score: a floor that no longer counts
_ROSE = 5.99  # 95% of χ² with two degrees of freedom


@runtime_checkable
class CurveLaw(Protocol):
    """A score as a function of x, with K constants, in a scale of its own."""

    name: str
    num_constants: int

    def to_scale(self, y: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]: ...

    def from_scale(self, y: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]: ...

    def fit(
        self,
        x: Float[np.ndarray, " X"],
        y: Float[np.ndarray, "draws X"],
        weights: Float[np.ndarray, " X"],
    ) -> Float[np.ndarray, "draws K"]:
        """Return the constants of each curve; y is in the law's scale."""
        ...

    def predict(
        self, theta: Float[np.ndarray, "draws K"], x: Float[np.ndarray, " Q"]
    ) -> Float[np.ndarray, "draws Q"]: ...

    def check(
        self,
        y: Float[np.ndarray, " X"],
        fitted: Float[np.ndarray, " X"],
        weights: Float[np.ndarray, " X"],
        variance: float,
    ) -> None:
        """Raise NotIdentifiableError where the curve does not determine the law."""
        ...


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """nats = A·X^(−b), or E + A·X^(−b) with a floor, where x = log X; noise relative.

    Source: Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1; the floor: Henighan et al. 2020,
    arXiv:2010.14701, eq. 1.1.
    """

    floor: bool = False

    @property
    def name(self) -> str:
        return "power law with floor" if self.floor else "power law"

    @property
    def num_constants(self) -> int:
        return 3 if self.floor else 2

    def to_scale(self, y: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        if (y <= 0).any():
            raise ValueError(f"a power law needs positive scores; the least is {np.nanmin(y):g}")
        return np.log(y)

    def from_scale(self, y: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        return np.exp(y)

    def fit(
        self,
        x: Float[np.ndarray, " X"],
        y: Float[np.ndarray, "draws X"],
        weights: Float[np.ndarray, " X"],
    ) -> Float[np.ndarray, "draws K"]:
        """Return (log A, b), or (log E, log A, b) with 0 < b."""
        if self.floor:
            starts = _relative_starts(x, np.exp(y), weights)
            lower = np.stack([y.min(1) - _FAR_BELOW, *np.full((2, len(y)), -np.inf)], 1)
            lower[:, 2] = 1e-4
            return _least_squares(self._linearise, starts, x, y, weights, lower)
        root = np.sqrt(weights)
        matrix = np.stack([np.ones_like(x), -x], 1) * root[:, None]
        return (y * root) @ np.linalg.pinv(matrix).T

    def predict(
        self, theta: Float[np.ndarray, "draws K"], x: Float[np.ndarray, " Q"]
    ) -> Float[np.ndarray, "draws Q"]:
        if self.floor:
            return self._linearise(theta, x)[0]
        return theta[:, :1] - theta[:, 1:] * x

    def check(
        self,
        y: Float[np.ndarray, " X"],
        fitted: Float[np.ndarray, " X"],
        weights: Float[np.ndarray, " X"],
        variance: float,
    ) -> None:
        pass  # a law that hardly falls foretells little, and its interval says so

    @staticmethod
    def _linearise(theta, x):
        log_floor, log_above = theta[:, :1], theta[:, 1:2] - theta[:, 2:] * x
        total = np.logaddexp(log_floor, log_above)
        share = np.exp(log_above - total)
        return total, np.stack([1 - share, share, -share * x], -1)


@dataclasses.dataclass(frozen=True)
class LogisticLaw:
    """accuracy = chance + (ceiling − chance) / (1 + e^(−(x − m)/w)), 0 < w; noise additive.

    Source: Ruan et al. 2024, arXiv:2405.10938: accuracies as sigmoids of log compute.
    """

    chance: float = 0.0
    ceiling: float = 1.0
    name = "logistic"
    num_constants = 2

    def __post_init__(self):
        if not 0 <= self.chance < self.ceiling <= 1:
            raise ValueError(
                f"chance {self.chance} and ceiling {self.ceiling}: 0 ≤ chance < ceiling ≤ 1"
            )

    def to_scale(self, y: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        return y

    def from_scale(self, y: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        return np.clip(y, 0.0, 1.0)

    def fit(
        self,
        x: Float[np.ndarray, " X"],
        y: Float[np.ndarray, "draws X"],
        weights: Float[np.ndarray, " X"],
    ) -> Float[np.ndarray, "draws K"]:
        """Return (m, log w), m up to three ranges of x outside it."""
        span = np.ptp(x)
        middles = np.linspace(x[0] - 3 * span, x[-1] + 3 * span, 106)
        widths = np.log(np.geomspace(span / 50, 3 * span, 15))
        grid = np.stack(np.meshgrid(middles, widths), -1).reshape(-1, 2)
        curves = self.predict(grid, x)
        off = ((curves**2) @ weights)[:, None] - 2 * (curves * weights) @ y.T
        starts = grid[np.argmin(off, 0)]
        lower = np.array([[middles[0], widths[0]]])
        return _least_squares(
            self._linearise, starts, x, y, weights, lower, np.array([middles[-1], widths[-1]])
        )

    def predict(
        self, theta: Float[np.ndarray, "draws K"], x: Float[np.ndarray, " Q"]
    ) -> Float[np.ndarray, "draws Q"]:
        return self._linearise(theta, x)[0]

    def check(
        self,
        y: Float[np.ndarray, " X"],
        fitted: Float[np.ndarray, " X"],
        weights: Float[np.ndarray, " X"],
        variance: float,
    ) -> None:
        gain = weights @ ((y - self.chance) ** 2 - (y - fitted) ** 2)
        if gain <= _ROSE * variance:
            raise NotIdentifiableError(
                f"the fitted scores do not rise above chance ({self.chance:.3g}) beyond their "
                f"noise ({np.sqrt(variance):.2g}): where they would is not told; move the cut up"
            )

    def _linearise(self, theta, x):
        width = np.exp(theta[:, 1:])
        z = (x - theta[:, :1]) / width
        share = 0.5 * (1 + np.tanh(0.5 * z))
        slope = (self.ceiling - self.chance) * share * (1 - share)
        jacobian = np.stack([-slope / width, -slope * z], -1)
        return self.chance + (self.ceiling - self.chance) * share, jacobian


def _relative_starts(
    x: Float[np.ndarray, " X"], y: Float[np.ndarray, "draws X"], weights: Float[np.ndarray, " X"]
) -> Float[np.ndarray, "draws 3"]:
    """Return (log E, log A, b) of least relative error, b on a grid: E and A are then linear."""
    slopes = np.geomspace(0.02, 50.0, 60) / np.ptp(x)
    falls = np.exp(-slopes[:, None] * (x - x.mean()))
    weights = weights / y**2
    ones, once = weights.sum(1)[:, None], weights @ falls.T
    twice, total = weights @ (falls**2).T, (weights * y).sum(1)[:, None]
    along = (weights * y) @ falls.T
    floor = (total * twice - along * once) / (ones * twice - once**2)
    floor = np.clip(floor, 1e-3 * y.min(1)[:, None], 0.98 * y.min(1)[:, None])
    height = np.maximum((along - floor * once) / twice, 1e-3 * y.min(1)[:, None])
    rest = floor**2 * ones + height**2 * twice + 2 * floor * height * once
    best = np.argmin(rest - 2 * (floor * total + height * along), 1)
    pick = (np.arange(len(y)), best)
    b = slopes[best]
    return np.stack([np.log(floor[pick]), np.log(height[pick]) + b * x.mean(), b], 1)


def _least_squares(
    linearise: Callable,
    starts: Float[np.ndarray, "draws K"],
    x: Float[np.ndarray, " X"],
    y: Float[np.ndarray, "draws X"],
    weights: Float[np.ndarray, " X"],
    lower: Float[np.ndarray, "#draws K"],
    upper: float | Float[np.ndarray, " K"] = np.inf,
) -> Float[np.ndarray, "draws K"]:
    """Return where each curve's start leads (Levenberg and Marquardt, all at once)."""
    theta = np.clip(starts, lower, upper)
    lower = np.broadcast_to(lower, theta.shape)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    for _ in range(_MAX_ITERATIONS):
        value, jacobian = linearise(theta[active], x)
        residual = y[active] - value
        rest = (residual**2) @ weights
        weighted = jacobian * weights[:, None]
        slope = (residual[:, None] @ weighted)[:, 0]
        hessian = np.swapaxes(weighted, 1, 2) @ jacobian
        scale = np.einsum("dkk->dk", hessian)
        damped = (damping[active, None] * scale + 1e-30)[..., None] * np.eye(theta.shape[1])
        step = np.linalg.solve(hessian + damped, slope[..., None])[..., 0]
        longest = np.abs(step).max(1, keepdims=True)
        step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(longest, 1e-300))
        moved = np.clip(theta[active] + step, lower[active], upper)
        after = ((y[active] - linearise(moved, x)[0]) ** 2) @ weights
        better = after < rest
        theta[active] = np.where(better[:, None], moved, theta[active])
        damping[active] *= np.where(better, 0.2, 5.0)
        going = np.where(better, rest - after > _TOLERANCE * rest, damping[active] < _STUCK)
        active = active[going]
        if not len(active):
            break
    return theta
