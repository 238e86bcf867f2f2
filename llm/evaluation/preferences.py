"""How well scores agree with people: accuracy, calibration, accuracy by margin. Third floor.

All of it from one vector: the score of the better response less that of the worse, a pair.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Bin:
    """Pairs of like prediction: how sure the model was on average, and how often it was right."""

    predicted: float
    observed: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class PreferenceReport:
    """Figures over held-out pairs; a pair of equal scores is half right."""

    pairs: int
    accuracy: float
    loss_nats: float  # −log σ(difference), a pair
    calibration_error: float  # expected: |predicted − observed| weighted by pairs
    calibration: tuple[Bin, ...]  # by confidence, from 1/2 to 1
    by_margin: tuple[Bin, ...]  # by |difference|, in groups of equal size; predicted is its mean


def report_preferences(
    differences: Float[np.ndarray, " pairs"], *, num_bins: int = 10
) -> PreferenceReport:
    """Return the figures of better-minus-worse score differences.

    A pair is predicted with confidence σ(|difference|), which lies in [1/2, 1]; calibration
    compares it with how often the pair was ordered rightly (Guo et al. 2017, arXiv:1706.04599).

    Raises:
      ValueError: there is no pair.
    """
    if not len(differences):
        raise ValueError("no held-out pair of responses to compare scores on")
    right = np.where(differences > 0, 1.0, np.where(differences == 0, 0.5, 0.0))
    size = np.abs(differences.astype(np.float64))
    confidence = 1.0 / (1.0 + np.exp(-size))
    edges = np.linspace(0.5, 1.0, num_bins + 1)[1:-1]
    places = np.digitize(confidence, edges)
    calibration = tuple(
        _bin(confidence[places == b], right[places == b])
        for b in range(num_bins)
        if (places == b).any()
    )
    groups = np.array_split(np.argsort(size, kind="stable"), min(5, len(size)))
    error = sum(b.pairs * abs(b.predicted - b.observed) for b in calibration) / len(right)
    return PreferenceReport(
        pairs=len(right),
        accuracy=float(right.mean()),
        loss_nats=float(np.logaddexp(0.0, -differences.astype(np.float64)).mean()),
        calibration_error=float(error),
        calibration=calibration,
        by_margin=tuple(_bin(size[group], right[group]) for group in groups),
    )


def pair_differences(
    scores: Float[np.ndarray, "G K"],
    levels: Float[np.ndarray, "G K"],
    present: np.ndarray,
) -> Float[np.ndarray, " pairs"]:
    """Return better-minus-worse score differences of all pairs of each prompt."""
    found = [np.zeros(0)]
    for row, level, here in zip(scores, levels, present, strict=True):
        row, level = row[here], level[here]
        better, worse = np.nonzero(level[:, None] > level[None, :])
        found.append(row[better] - row[worse])
    return np.concatenate(found)


def _bin(predicted: np.ndarray, right: np.ndarray) -> Bin:
    return Bin(float(predicted.mean()), float(right.mean()), len(right))
