"""Shapes that a curve over size, compute or steps may have, fitted by least squares. Third floor.

Each shape is linear once its one or two nonlinear constants are fixed, so these run over a grid and
the rest is a projection: no start, no local optimum, and a thousand curves are one product.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

_NUM_WIDTHS = 10  # of steps, from a jump to the widest that still is one
_NUM_MIDDLES, _NUM_SMOOTH_WIDTHS = 91, 13  # of smooth sigmoids


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A family of shapes on X places: for each of C choices of its nonlinear constants, an
    orthonormal basis of what it explains beyond a constant, places weighted by their seeds.
    """

    weights: Float[np.ndarray, " X"]
    basis: Float[np.ndarray, "C K X"]

    @classmethod
    def of(cls, columns: Float[np.ndarray, "C K X"], weights: Float[np.ndarray, " X"]) -> "Shapes":
        centred = columns - (columns @ weights / weights.sum())[..., None]
        centred = centred / np.abs(centred).max(-1, keepdims=True) * np.sqrt(weights)
        if columns.shape[1] == 1:
            return cls(weights, centred / np.linalg.norm(centred, axis=-1, keepdims=True))
        basis = np.swapaxes(np.linalg.qr(np.swapaxes(centred, -1, -2))[0], -1, -2)
        return cls(weights, np.ascontiguousarray(basis))

    def left_over(self, means: Float[np.ndarray, "draws X"]) -> Float[np.ndarray, "C draws"]:
        """Return the weighted sum of squares of each curve of means that each choice leaves."""
        curves = self._centred(means)
        choices, size, places = self.basis.shape
        along = self.basis.reshape(-1, places) @ curves.T
        explained = np.square(along, out=along).reshape(choices, size, -1)
        explained = explained.sum(1) if size > 1 else explained[:, 0]
        return np.maximum((curves**2).sum(-1) - explained, 0.0)

    def best(self, means: Float[np.ndarray, " X"]) -> Float[np.ndarray, " X"]:
        """Return the curve that the best choice fits."""
        return self.fitted(means, int(np.argmin(self.left_over(means[None])[:, 0])))

    def fitted(self, means: Float[np.ndarray, " X"], choice: int) -> Float[np.ndarray, " X"]:
        """Return the curve that one choice fits."""
        basis, curve = self.basis[choice], self._centred(means[None])[0]
        middle = (means @ self.weights) / self.weights.sum()
        return middle + (curve @ basis.T) @ basis / np.sqrt(self.weights)

    def _centred(self, means: Float[np.ndarray, "draws X"]) -> Float[np.ndarray, "draws X"]:
        middle = means @ self.weights / self.weights.sum()
        return (means - middle[:, None]) * np.sqrt(self.weights)


@dataclasses.dataclass(frozen=True)
class Changes:
    """Knees and steps at each of T positions, the steps in some widths.

    Knee: y = a + b·x + d·max(x − τ, 0). Step: y = a + d / (1 + e^(−(x − τ)/w)), a jump for w = 0.
    """

    positions: Float[np.ndarray, " T"]
    widths: Float[np.ndarray, " W"]
    knees: Shapes  # of T choices
    steps: Shapes  # of T · W choices

    def profiles(
        self, means: Float[np.ndarray, "draws X"]
    ) -> tuple[Float[np.ndarray, "T draws"], Float[np.ndarray, "T draws"]]:
        """Return what the knee and the best step at each position leave."""
        steps = self.steps.left_over(means)
        steps = steps.reshape(len(self.positions), len(self.widths), -1)
        return self.knees.left_over(means), steps.min(1)

    def left_over(self, means: Float[np.ndarray, "draws X"]) -> Float[np.ndarray, "T draws"]:
        """Return what the better of knee and step at each position leaves."""
        return np.minimum(*self.profiles(means))


def change_shapes(
    x: Float[np.ndarray, " X"],
    weights: Float[np.ndarray, " X"],
    *,
    widest_step: float,
    num_positions: int,
) -> Changes:
    """Return knees and steps between the second and the last but one place.

    Beyond these a slope would rest on a single place.

    Args:
      widest_step: of the range of x, within which a step makes 76% of its way (four widths).
    """
    positions = np.linspace(x[1], x[-2], num_positions)
    away = x - positions[:, None]
    knees = np.stack([np.broadcast_to(x, away.shape), np.maximum(away, 0.0)], 1)
    widest, gap = _width(x, widest_step), np.diff(x).min()
    widths = np.geomspace(min(gap, widest) / 8, widest, _NUM_WIDTHS - 1)
    # Half-way exactly at the position, as every other step.
    jump = np.where(np.isclose(away, 0.0, atol=1e-9 * np.ptp(x)), 0.5, (away > 0).astype(float))
    steps = np.stack([jump, *(_sigmoid(away / width) for width in widths)], 1)
    return Changes(
        positions,
        np.concatenate([[0.0], widths]),
        Shapes.of(knees, weights),
        Shapes.of(steps.reshape(-1, 1, len(x)), weights),
    )


def smooth_shapes(
    family: str, x: Float[np.ndarray, " X"], weights: Float[np.ndarray, " X"], *, widest_step: float
) -> Shapes:
    """Return the shapes of a smooth family: "line", "cubic" or "sigmoid".

    Sigmoids are those wider than any step, their middle up to one range outside the data, and
    their limits far outside: exponentials in x, which are power laws where x is a logarithm.

    Raises:
      ValueError: there is no such family.
    """
    z = 2 * (x - x[0]) / np.ptp(x) - 1
    match family:
        case "line":
            columns = z[None, None]
        case "cubic":
            columns = np.stack([z, z**2, z**3])[None]
        case "sigmoid":
            widths = _width(x, widest_step) * np.geomspace(1, 16, _NUM_SMOOTH_WIDTHS)
            middles = np.linspace(x[0] - np.ptp(x), x[-1] + np.ptp(x), _NUM_MIDDLES)
            sigmoids = _sigmoid((x - middles[:, None, None]) / widths[:, None])
            rising = np.exp((x - x[-1]) / widths[:, None])
            falling = np.exp((x[0] - x) / widths[:, None])
            columns = np.concatenate([sigmoids.reshape(-1, len(x)), rising, falling])[:, None]
        case _:
            raise ValueError(f"no smooth family {family!r}: there are line, cubic and sigmoid")
    return Shapes.of(columns, weights)


def flat_stretch(left_over: Float[np.ndarray, " T"], tolerance: float) -> Int[np.ndarray, " _"]:
    """Return the positions that are as good as the best: a jump is anywhere between two places."""
    return np.flatnonzero(left_over <= left_over.min() * (1 + 1e-6) + tolerance)


def _width(x: Float[np.ndarray, " X"], share: float) -> float:
    return float(share * np.ptp(x) / 4)


def _sigmoid(z: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    return 0.5 * (1 + np.tanh(0.5 * z))
