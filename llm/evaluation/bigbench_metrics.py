"""BIG-bench's metrics of one example, and smooth ones beside them. Third floor.

Source: Srivastava et al. 2022, arXiv:2206.04615, as `bigbench` 1.0.0 (api/task_metrics.py) defines
them. Where this differs: tied choices share their scores, and a numeric target may be negative.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

BRIER = "calibration_multiple_choice_brier_score"
CHOICE_METRICS = ("multiple_choice_grade", BRIER, "macro_f1")
TEXT_METRICS = (
    "exact_str_match",
    "case_insensitive_str_match",
    "numeric_match_with_0_1_relative_error",
)
LIKELIHOOD_METRICS = ("log_likelihood",)
METRICS = CHOICE_METRICS + TEXT_METRICS + LIKELIHOOD_METRICS  # what tasks may ask for


def choice_scores(
    nats: Float[np.ndarray, " choices"],
    num_bytes: Float[np.ndarray, " choices"],
    target_scores: Float[np.ndarray, " choices"],
) -> dict[str, float]:
    """Return the scores of one example from its choices' log-likelihoods.

    With zeros for `nats` and equal `num_bytes` they are those of a uniformly random choice.
    """
    log_shares = nats - np.logaddexp.reduce(nats)
    shares, wanted = np.exp(log_shares), target_scores / target_scores.sum()
    per_byte, right = nats / num_bytes, target_scores == target_scores.max()
    return {
        "multiple_choice_grade": float(target_scores[nats == nats.max()].mean()),
        "multiple_choice_grade_length_normalised": float(
            target_scores[per_byte == per_byte.max()].mean()
        ),
        "probability_mass": float(shares @ target_scores),
        BRIER: float(np.mean(wanted * (shares - 1) ** 2 + (1 - wanted) * shares**2)),
        "choice_nats": float(-np.logaddexp.reduce(log_shares[right])),
    }


def cut_response(text: str, stop_string: str | None, output_regex: str | None) -> str:
    """Return the answer in what was written: up to and with the stop string unless it is first,
    then the first match of the regular expression, or of its group."""
    if stop_string and (at := text.find(stop_string)) > 0:
        text = text[: at + len(stop_string)]
    if output_regex:
        match = re.search(output_regex, text)
        text = (match[1 if match.re.groups else 0] or "") if match else ""
    return text


def text_scores(response: str, targets: Sequence[str]) -> dict[str, float]:
    """Return the scores of a written answer. Chance gives 0 of each."""
    plain = response.strip().lower()
    return {
        "exact_str_match": float(response in targets),
        "case_insensitive_str_match": float(plain in [t.strip().lower() for t in targets]),
        "numeric_match_with_0_1_relative_error": float(any(_near(response, t) for t in targets)),
    }


def _near(response: str, target: str) -> bool:
    try:
        wanted, got = float(target), float(response)
    except ValueError:
        return False
    return abs(got - wanted) <= 0.1 * (abs(wanted) or 1.0)
