"""A curve measured with several seeds a place, and draws of its noise. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Float

from llm.scaling.runs import NotIdentifiableError

_LEAST_PLACES = 5  # a knee has four constants
_LEAST_PLACES_ALONE = 8  # with one seed they must give the noise as well
_LEAST_SEEDS_JOINT = 3
_FEW_SEEDS_JOINT = 10  # 3 to 5 gave up to 9% of false alarms in place of 5%
_CONSTANTS = 4  # of a knee or a step
_ROUNDING = 1e-12  # of a curve's sum of squares: below it there is no noise


@dataclasses.dataclass(frozen=True)
class SeedCurve:
    """A curve's means, and the noise of its seeds."""

    means: Float[np.ndarray, " X"]
    weights: Float[np.ndarray, " X"]  # seeds of each place
    deviations: tuple[Float[np.ndarray, " _"], ...]  # from the mean of each place
    within: float  # their sum of squares
    joint: bool

    @classmethod
    def of(
        cls, x: Float[np.ndarray, " X"], y: Float[np.ndarray, "X S"], joint: bool
    ) -> "SeedCurve":
        """Return the curve of y at places x, NaN where a seed is missing.

        Raises:
          NotIdentifiableError: there are too few places or seeds for a change point.
          ValueError: x does not increase, a place has no score, or a score is infinite.
        """
        present = ~np.isnan(y)
        counts = present.sum(1)
        if (np.diff(x) <= 0).any() or not np.isfinite(x).all():
            raise ValueError("x must be finite and increase from place to place")
        if not counts.all() or np.isinf(y).any():
            bad = x[(counts == 0) | np.isinf(y).any(1)][0]
            raise ValueError(f"x = {bad:g} has no score, or an infinite one")
        least = _LEAST_PLACES if counts.min() > 1 else _LEAST_PLACES_ALONE
        if len(x) < least:
            each = "2 seeds or more" if counts.min() > 1 else "a single seed at some"
            raise NotIdentifiableError(
                f"{len(x)} places with {each}: a change point needs {least}, or "
                f"{_LEAST_PLACES} with 2 seeds each; add sizes (or steps) between these"
            )
        if joint and (not present.all() or y.shape[1] < _LEAST_SEEDS_JOINT):
            raise NotIdentifiableError(
                f"{y.shape[1]} seeds, of which {(~present).any(0).sum()} lack a score: drawn as a "
                f"whole, {_LEAST_SEEDS_JOINT} at least are needed, each with all scores"
            )
        means = np.nansum(y, 1) / counts
        deviations = tuple(
            row[here] - mean for row, here, mean in zip(y, present, means, strict=True)
        )
        within = float(sum((row**2).sum() for row in deviations))
        return cls(means, counts.astype(float), deviations, within, joint)

    @property
    def count(self) -> int:
        return int(self.weights.sum())

    @property
    def single(self) -> bool:
        return bool(self.weights.min() == 1)

    @property
    def caution(self) -> float:
        """Return what p-values are multiplied with, see `find_change_point`."""
        return 2.0 if self.joint and self.weights[0] < _FEW_SEEDS_JOINT else 1.0

    @property
    def rounding(self) -> float:
        return _ROUNDING * float(self.within + self.weights @ self.means**2) + 1e-300

    def draw_noise(
        self, fitted: Float[np.ndarray, " X"], num_draws: int, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "draws X"], Float[np.ndarray, " draws"]]:
        """Return draws of the noise of the means, and of the sum of squares within places.

        Resampled are, within each place, the seeds' deviations, or whole seeds where `joint`; where
        some place has one seed, all residuals about `fitted`. Each is widened for the constants
        that were taken from it.
        """
        rows = self.deviations
        if self.single:
            off = (self.means - fitted).repeat(self.weights.astype(int)) + np.concatenate(rows)
            pool = (off - off.mean()) * np.sqrt(self.count / (self.count - _CONSTANTS))
            drawn = [rng.choice(pool, (num_draws, len(row))) for row in rows]
        else:
            wide = [row * np.sqrt(len(row) / (len(row) - 1)) for row in rows]
            picked = rng.integers(len(rows[0]), size=(num_draws, len(rows[0])))
            drawn = [
                row[picked if self.joint else rng.integers(len(row), size=(num_draws, len(row)))]
                for row in wide
            ]
        means = np.stack([each.mean(1) for each in drawn], 1)
        return means, np.sum([each.var(1) * each.shape[1] for each in drawn], 0)
