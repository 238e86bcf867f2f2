"""How well scores agree with people: accuracy, calibration, accuracy by margin. Third floor.

All of it from two numbers a pair: by how much the better response scores higher than the worse,
and by how much people found it better.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Bin:
    """Pairs of like prediction: how sure the model was on average, and how often it was right."""

    predicted: float
    observed: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class MarginBin:
    """Pairs that people found as different as each other, and how often the model was right."""

    margin: float  # their mean
    accuracy: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class PreferenceReport:
    """Figures over held-out pairs; a pair of equal scores is half right."""

    pairs: int
    accuracy: float
    loss_nats: float  # −log σ(difference), a pair
    calibration_error: float  # expected: |predicted − observed| weighted by pairs
    calibration: tuple[Bin, ...]  # by confidence, from 1/2 to 1
    by_margin: tuple[MarginBin, ...]  # by the labels' margin; empty where they have but one


def report_preferences(
    differences: Float[np.ndarray, " pairs"],
    margins: Float[np.ndarray, " pairs"],
    *,
    num_bins: int = 10,
) -> PreferenceReport:
    """Return the figures of better-minus-worse score differences and the labels' margins.

    A pair is predicted with confidence σ(|difference|), which lies in [1/2, 1]; calibration
    compares it with how often the pair was ordered rightly (Guo et al. 2017, arXiv:1706.04599).

    Raises:
      ValueError: there is no pair.
    """
    if not len(differences):
        raise ValueError("no held-out pair of responses to compare scores on")
    differences = differences.astype(np.float64)
    right = np.where(differences > 0, 1.0, np.where(differences == 0, 0.5, 0.0))
    confidence = 1.0 / (1.0 + np.exp(-np.abs(differences)))
    edges = np.linspace(0.5, 1.0, num_bins + 1)[1:-1]
    calibration = tuple(
        Bin(float(confidence[here].mean()), float(right[here].mean()), int(here.sum()))
        for here in _groups(np.digitize(confidence, edges))
    )
    error = sum(b.pairs * abs(b.predicted - b.observed) for b in calibration) / len(right)
    return PreferenceReport(
        pairs=len(right),
        accuracy=float(right.mean()),
        loss_nats=float(np.logaddexp(0.0, -differences).mean()),
        calibration_error=float(error),
        calibration=calibration,
        by_margin=_by_margin(right, margins),
    )


def compare_pairs(
    scores: Sequence[Float[np.ndarray, " _"]],
    levels: Sequence[Float[np.ndarray, " _"]],
    margins: Sequence[float],
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """Return (better-minus-worse score differences, labelled margins) of all pairs of each prompt.

    A pair's margin is the one given with its prompt, if any prompt has one; else the difference of
    levels: of ratings, of ranks, of shares of thumbs up.
    """
    differences, found = [np.zeros(0)], [np.zeros(0)]
    for score, level, margin in zip(scores, levels, margins, strict=True):
        better, worse = np.nonzero(level[:, None] > level[None, :])
        differences.append(score[better] - score[worse])
        size = np.full(len(better), margin) if any(margins) else level[better] - level[worse]
        found.append(size)
    return np.concatenate(differences), np.concatenate(found)


def _by_margin(
    right: Float[np.ndarray, " pairs"], margins: Float[np.ndarray, " pairs"], most: int = 5
) -> tuple[MarginBin, ...]:
    """Return a bin a size; where they are many, some of about equal numbers of pairs."""
    margins = np.round(margins.astype(np.float64), 5)  # 0.3 − 0.2 is 0.2 − 0.1
    sizes, places = np.unique(margins, return_inverse=True)
    if len(sizes) == 1:
        return ()
    if len(sizes) > most:
        places = np.searchsorted(np.quantile(margins, np.linspace(0, 1, most + 1)[1:-1]), margins)
    return tuple(
        MarginBin(float(margins[here].mean()), float(right[here].mean()), int(here.sum()))
        for here in _groups(places)
    )


def _groups(places: np.ndarray) -> list[np.ndarray]:
    """Return a mask of each place that occurs, in order."""
    return [places == place for place in np.unique(places)]
