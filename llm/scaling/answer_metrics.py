"""What three scores of an answer say of each other, and what chance gives. Third floor.

The scores themselves are measured by llm/evaluation/answers.py; here are closed forms.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What an answer gets from one who has not seen the question."""

    exact_match: float
    token_accuracy: float
    answer_nats: float  # of all tokens of an answer together, averaged over answers


def exact_match_if_independent(
    accuracies: Float[np.ndarray, "*batch places"],
) -> Float[np.ndarray, "*batch"]:
    """Return exact match where an answer's tokens are right or wrong independently: the product.

    Whatever the dependence, exact match lies between `exact_match_bounds`.

    Raises:
      ValueError: an accuracy is not in 0 to 1.
    """
    _check_share("an accuracy", accuracies)
    return np.asarray(np.prod(accuracies, -1))


def exact_match_of_length(
    token_accuracy: Float[np.ndarray, "*batch"], answer_tokens: float
) -> Float[np.ndarray, "*batch"]:
    """Return token accuracy to the power of the answer's length: exact match of independent
    tokens of equal accuracy.

    Raises:
      ValueError: an accuracy is not in 0 to 1, or the length is not positive.

    Source: Schaeffer et al. 2023, arXiv:2304.15004, section 2.
    """
    _check_share("an accuracy", token_accuracy)
    if not answer_tokens > 0:
        raise ValueError(f"an answer of {answer_tokens} tokens: it has one at least")
    return np.asarray(token_accuracy**answer_tokens)


def exact_match_bounds(
    accuracies: Float[np.ndarray, "*batch places"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Return the least and the greatest exact match with these accuracies by place.

    All errors in different answers, or all in the same: max(0, 1 − Σ(1 − aᵢ)) and min aᵢ.

    Source: Fréchet 1935; both are reached.
    """
    _check_share("an accuracy", accuracies)
    least = np.maximum(1 - (1 - accuracies).sum(-1), 0.0)
    return np.asarray(least), np.asarray(accuracies.min(-1))


def likeliest_accuracy(nats_per_token: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Return e^(−nats): the geometric mean of the probabilities that the right tokens get.

    What Schaeffer et al. take for token accuracy. Exactly, it is a lower bound of the accuracy of
    tokens that are *sampled*, E[p] ≥ e^(E[log p]) by Jensen, and reached where all right tokens
    have one probability. Of greedy decoding it is neither bound: see `greedy_accuracy_bound`.

    Source: Schaeffer et al. 2023, arXiv:2304.15004, section 2.
    """
    _check_nats(nats_per_token)
    return np.asarray(np.exp(-nats_per_token))


def greedy_accuracy_bound(nats: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Return the least share that greedy decoding can get right: max(0, 1 − nats/log 2).

    A wrong token has a probability of 1/2 at most (another is likelier or as likely), so each costs
    log 2 or more: nats per token bound token accuracy, and nats per answer exact match, for an
    answer with a wrong token costs log 2 as well. Reached where wrong tokens have 1/2 and right
    ones 1. From above nats bound nothing: one wrong token may cost any number of them.
    """
    _check_nats(nats)
    return np.asarray(np.maximum(1 - nats / np.log(2), 0.0))


def uniform_baseline(alphabet: int, lengths: Int[np.ndarray, " N"]) -> Baseline:
    """Return what guessing each token alike among those of the alphabet gives.

    Args:
      alphabet: how many tokens an answer's token may be.
      lengths: tokens of each answer, the one that ends it included where the model must give it.

    Raises:
      ValueError: the alphabet is empty, or there is no answer, or one has no token.
    """
    if alphabet < 1 or not len(lengths) or lengths.min() < 1:
        raise ValueError(
            f"alphabet {alphabet} and {len(lengths)} answers: there is one token at least, and one "
            "answer, and none is empty"
        )
    return Baseline(
        float(np.mean(float(alphabet) ** -lengths)),
        1 / alphabet,
        float(np.log(alphabet) * lengths.mean()),
    )


def constant_baseline(answers: Int[np.ndarray, "N L"]) -> Baseline:
    """Return what the best answer gives that does not depend on the question, for each score.

    Exact match: the commonest answer. Token accuracy: the commonest token of each place. Nats: the
    frequencies at each place as probabilities, so the sum of their entropies. A model that has
    learnt only how answers are distributed gets these, more than `uniform_baseline` where they are
    uneven (as the leading digit of a sum is).

    Args:
      answers: tokens of N answers of equal length, as they are scored.

    Raises:
      ValueError: there is no answer or no token.
    """
    if not answers.size:
        raise ValueError(f"answers of shape {answers.shape}: there must be one, of one token")
    counts = np.unique(answers, axis=0, return_counts=True)[1]
    places = [np.unique(place, return_counts=True)[1] / len(answers) for place in answers.T]
    return Baseline(
        float(counts.max() / len(answers)),
        float(np.mean([shares.max() for shares in places])),
        float(sum(-(shares * np.log(shares)).sum() for shares in places)),
    )


def _check_share(name: str, values: Float[np.ndarray, "*batch"]) -> None:
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"{name} is {np.ravel(values)[np.argmax(np.abs(values - 0.5))]:g}")


def _check_nats(nats: Float[np.ndarray, "*batch"]) -> None:
    if (nats < 0).any():
        raise ValueError(f"nats are {nats.min():g}; they are not negative")
