"""The minimiser behind every law: a Huber loss on log loss, summed, over many starts at once.

A batched second-order method in NumPy: a grid of starts, or a thousand resamples of the table, is
one call. Third floor.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, of log loss
_MAX_ITERATIONS = 400
_TOLERANCE = 1e-7  # of the relative gradient
_LONGEST_STEP = 2.0  # of a constant: logs and exponents both
_BATCH_CELLS = 100_000  # starts times runs in memory at once


@runtime_checkable
class Law(Protocol):
    """The log loss of each run as a function of K constants, for S vectors of them at once."""

    def predict(self, theta: Float[np.ndarray, "S K"]) -> Float[np.ndarray, "S R"]: ...

    def linearise(
        self, theta: Float[np.ndarray, "S K"]
    ) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R K"]]:
        """Return the prediction and its derivatives."""
        ...

    def curvature(
        self,
        theta: Float[np.ndarray, "S K"],
        jacobian: Float[np.ndarray, "S R K"],
        pull: Float[np.ndarray, "S R"],
    ) -> Float[np.ndarray, "S K K"]:
        """Return the sum over runs of `pull` times the second derivatives of the prediction."""
        ...


@dataclasses.dataclass(frozen=True)
class Minimum:
    """Where each start ended."""

    theta: Float[np.ndarray, "S K"]
    objective: Float[np.ndarray, " S"]
    gradient: Float[np.ndarray, " S"]  # relative, see `relative_gradient`
    iterations: Int[np.ndarray, " S"]

    @property
    def converged(self) -> Bool[np.ndarray, " S"]:
        return self.gradient <= _TOLERANCE

    @property
    def best(self) -> int:
        return int(np.argmin(np.where(np.isfinite(self.objective), self.objective, np.inf)))

    def arrived(self, tolerance: float = 1e-6) -> Bool[np.ndarray, " S"]:
        """Return which starts ended at the least objective of all, to a relative tolerance.

        Where the law holds exactly, the least is rounding noise: below 1e-12 all ends are one.
        """
        return self.objective <= self.objective[self.best] * (1 + tolerance) + 1e-12


def huber(
    residual: Float[np.ndarray, "*batch"], delta: float = HUBER_DELTA
) -> Float[np.ndarray, "*batch"]:
    """Return r²/2 where |r| ≤ delta, else delta · (|r| − delta/2).

    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 3.
    """
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective_and_gradient(
    law: Law,
    log_loss: Float[np.ndarray, " R"],
    theta: Float[np.ndarray, " K"],
    *,
    delta: float = HUBER_DELTA,
) -> tuple[float, Float[np.ndarray, " K"]]:
    """Return the summed Huber loss of one vector of constants, and its analytic gradient.

    The sum, not the mean: an optimizer's default tolerances are absolute, and a mean over 240 runs
    of a Huber loss with delta 1e-3 is about 4e-6, small enough to stop scipy's L-BFGS-B on the way.

    Source: Besiroglu et al. 2024, arXiv:2404.10102, on what went wrong in Hoffmann et al. 2022.
    """
    predicted, jacobian = law.linearise(theta[None])
    residual = predicted[0] - log_loss
    pull = np.clip(residual, -delta, delta)
    return float(huber(residual, delta).sum()), pull @ jacobian[0]


def minimise(
    law: Law,
    log_loss: Float[np.ndarray, " R"],
    starts: Float[np.ndarray, "S K"],
    weights: Float[np.ndarray, "W R"] | None = None,
    *,
    delta: float = HUBER_DELTA,
    lower: Float[np.ndarray, " K"] | None = None,
) -> Minimum:
    """Minimise the summed Huber loss of log loss from every start, each to a vanishing gradient.

    Each step is the better of two, both damped (Levenberg and Marquardt) and both scaled by the
    diagonal, so that neither the units of a constant nor a term that hardly counts yet slows them:
    one with the exact second derivatives, their negative directions turned round, and one with the
    quadratic that lies above the Huber loss everywhere (iteratively reweighted least squares). The
    second is safe far off, the first fast near the end. The objective never rises.

    Args:
      weights: how often each run counts, for all starts (W = 1) or each its own (W = S).
      lower: bounds of the constants; one that rests on its bound is at its optimum there.
    """
    num_starts, num_runs = len(starts), len(log_loss)
    weights = np.ones((1, num_runs)) if weights is None else weights
    lower = np.full(starts.shape[1], -np.inf) if lower is None else lower
    size = max(1, _BATCH_CELLS // num_runs)
    parts = []
    for first in range(0, max(num_starts, 1), size):
        part = slice(first, first + size)
        own = weights if len(weights) == 1 else weights[part]
        parts.append(_minimise_batch(law, log_loss, starts[part], own, delta, lower))
    fields = (field.name for field in dataclasses.fields(Minimum))
    return Minimum(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in fields})


def _minimise_batch(
    law: Law,
    log_loss: Float[np.ndarray, " R"],
    starts: Float[np.ndarray, "S K"],
    weights: Float[np.ndarray, "W R"],
    delta: float,
    lower: Float[np.ndarray, " K"],
) -> Minimum:
    count = len(starts)
    theta = np.maximum(starts, lower)
    objective, gradient = np.full(count, np.inf), np.full(count, np.inf)
    iterations = np.zeros(count, int)
    damping = np.full((2, count), 1e-3)
    active = np.arange(count)
    for step in range(_MAX_ITERATIONS):
        here, w = theta[active], weights if len(weights) == 1 else weights[active]
        predicted, jacobian = law.linearise(here)
        residual = predicted - log_loss
        pull = w * np.clip(residual, -delta, delta)
        slope = _over_runs(pull, jacobian)
        resting = (here <= lower) & (slope > 0)
        slope = np.where(resting, 0.0, slope)
        objective[active] = (w * huber(residual, delta)).sum(-1)
        gradient[active] = relative_gradient(slope, jacobian, w, delta)
        iterations[active] = step
        going = gradient[active] > _TOLERANCE
        active = active[going]
        if not len(active):
            break
        here, residual, jacobian, pull, slope, resting = (
            x[going] for x in (here, residual, jacobian, pull, slope, resting)
        )
        w = w if len(w) == 1 else w[going]
        inside = w * (np.abs(residual) <= delta)
        exact = _outer(inside, jacobian) + law.curvature(here, jacobian, pull)
        above = _outer(w * delta / np.maximum(np.abs(residual), delta), jacobian)
        tried = []
        for i, hessian in enumerate((exact, above)):
            hessian = _hold(hessian, resting)
            moved = np.maximum(here + _damped_step(hessian, slope, damping[i, active]), lower)
            value = (w * huber(law.predict(moved) - log_loss, delta)).sum(-1)
            value = np.where(np.isfinite(value), value, np.inf)
            better = value < objective[active]
            factor = np.where(better, 0.25, 4.0)
            damping[i, active] = np.clip(damping[i, active] * factor, 1e-12, 1e12)
            tried.append((value, moved))
        (first, by_exact), (second, by_above) = tried
        best = np.where((first < second)[:, None], by_exact, by_above)
        better = np.minimum(first, second) < objective[active]
        theta[active] = np.where(better[:, None], best, here)
    return Minimum(theta, objective, gradient, iterations)


def relative_gradient(
    slope: Float[np.ndarray, "S K"],
    jacobian: Float[np.ndarray, "S R K"],
    weights: Float[np.ndarray, "W R"],
    delta: float,
) -> Float[np.ndarray, " S"]:
    """Return the largest slope, each over what it would be if all runs pulled one way: 0 to 1.

    Free of units, and as large for a term that has all but vanished as for one that counts: a start
    that is stuck on a plain is not taken for one that has converged.
    """
    most = delta * _over_runs(np.broadcast_to(weights, jacobian.shape[:2]), np.abs(jacobian))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(slope == 0, 0.0, np.abs(slope) / most)
    # A constant that changes no prediction at all has not been fitted.
    return np.where(most > 0, share, np.inf).max(-1)


def _over_runs(
    weights: Float[np.ndarray, "S R"], jacobian: Float[np.ndarray, "S R K"]
) -> Float[np.ndarray, "S K"]:
    return (weights[:, None, :] @ jacobian)[:, 0]


def _outer(
    weights: Float[np.ndarray, "S R"], jacobian: Float[np.ndarray, "S R K"]
) -> Float[np.ndarray, "S K K"]:
    return np.swapaxes(jacobian * weights[..., None], -1, -2) @ jacobian


def _hold(
    hessian: Float[np.ndarray, "S K K"], resting: Bool[np.ndarray, "S K"]
) -> Float[np.ndarray, "S K K"]:
    """Part the constants that rest on their bounds from the others."""
    free = ~resting
    kept = hessian * (free[:, :, None] & free[:, None, :])
    return kept + np.eye(hessian.shape[-1]) * resting[:, None, :]


def _damped_step(
    hessian: Float[np.ndarray, "S K K"],
    slope: Float[np.ndarray, "S K"],
    damping: Float[np.ndarray, " S"],
) -> Float[np.ndarray, "S K"]:
    """Return the step downhill of a quadratic whose negative directions are turned round."""
    scale = np.sqrt(np.abs(np.einsum("skk->sk", hessian)))
    scale = np.where(scale > 0, scale, 1.0)
    scaled = hessian / scale[:, :, None] / scale[:, None, :]
    scaled = np.where(np.isfinite(scaled), scaled, 0.0)
    values, vectors = np.linalg.eigh(scaled)
    along = np.einsum("skl,sk->sl", vectors, slope / scale)
    along /= np.abs(values) + damping[:, None] + 1e-13
    step = -np.einsum("skl,sl->sk", vectors, along) / scale
    longest = np.abs(step).max(-1, keepdims=True)
    step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(longest, 1e-300))
    return np.where(np.isfinite(step), step, 0.0)


def numerical_curvature(
    law: Law,
    theta: Float[np.ndarray, "S K"],
    pull: Float[np.ndarray, "S R"],
    *,
    width: float = 1e-5,
) -> Float[np.ndarray, "S K K"]:
    """Return a law's `curvature` by central differences of its Jacobian."""
    columns = []
    for k in range(theta.shape[1]):
        shift = np.zeros(theta.shape[1])
        shift[k] = width
        change = _over_runs(pull, law.linearise(theta + shift)[1] - law.linearise(theta - shift)[1])
        columns.append(change / (2 * width))
    curvature = np.stack(columns, -1)
    return 0.5 * (curvature + np.swapaxes(curvature, -1, -2))
