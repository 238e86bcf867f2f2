"""The n-gram baseline a language model has to beat: interpolated modified Kneser–Ney, in NumPy.

It reads the very tokens and the very split that the model reads, so their nats are comparable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

# KenLM's choice for data too small or too odd for the estimate from counts of counts.
FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one order n >= 2, as the edges of a trie.

    An n-gram's node is its rank in `keys`; its key is `node of its first n - 1 tokens` * V + `last
    token`. (A key that packs n whole tokens would outgrow 64 bits at n = 5 and V = 8,192.)
    """

    keys: Int[np.ndarray, " ngrams"]
    probabilities: Float[np.ndarray, " ngrams"]  # max(c - D(c), 0) / total of the context
    backoffs: Float[np.ndarray, " contexts"]  # gamma, by the node of the context


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """An interpolated n-gram model; see `fit_ngram` for its equations."""

    order: int
    vocab_size: int
    discounts: tuple[tuple[float, float, float, float], ...]  # D(0), D(1), D(2), D(3+) by order
    unigrams: Float[np.ndarray, " V"]
    orders: tuple[_Order, ...]  # orders 2 to `order`

    def log_probs(self, document: Int[np.ndarray, " tokens"]) -> Float[np.ndarray, " targets"]:
        """Return ln p(target | tokens before it) of each target, that is of all but the first."""
        return self.log_probs_of([document])[0]

    def log_probs_of(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return `log_probs` of each document; one pass, for corpora of many short documents."""
        if not documents:
            return []
        tokens, positions = _concatenate(documents, self.vocab_size)
        probabilities = self.unigrams[tokens]
        nodes = tokens
        for length, order in enumerate(self.orders, start=2):
            contexts = np.concatenate([[-1], nodes[:-1]])
            contexts[positions < length - 1] = -1
            seen = contexts >= 0  # by order 3 also: the context occurred in training
            backoffs = order.backoffs[contexts[seen]]
            nodes = np.full(len(tokens), -1)
            nodes[seen] = _find(order.keys, contexts[seen] * self.vocab_size + tokens[seen])
            probabilities[seen] *= backoffs
            found = nodes >= 0
            probabilities[found] += order.probabilities[nodes[found]]
        starts = np.cumsum([len(document) for document in documents])[:-1]
        return [np.log(part[1:]) for part in np.split(probabilities, starts)]


def fit_ngram(documents: Iterable[np.ndarray], order: int, vocab_size: int) -> NgramModel:
    """Fit an interpolated modified Kneser–Ney model to documents of token ids.

    With h a context, h' the same without its first token, and w a token:

      p_n(w | h) = max(c(h w) - D_n(c(h w)), 0) / sum_v c(h v) + gamma_n(h) p_{n-1}(w | h')
      gamma_n(h) = sum_k D_n(k) N_k(h .) / sum_v c(h v)      k = 1, 2, 3 or more
      p_0(w)     = 1 / V

    where N_k(h .) counts the tokens w with c(h w) = k. At the highest order c is the number of
    occurrences; below it the continuation count N_1+(. h w), the number of distinct tokens seen
    before. The discounts come from counts of counts, n_k the number of n-grams with c = k:

      Y = n_1 / (n_1 + 2 n_2);  D(k) = k - (k + 1) Y n_{k+1} / n_k for k = 1, 2, 3 (or more)

    A context that never occurred passes the lower order on unchanged, so every conditional
    distribution sums to one over the whole vocabulary.

    Each document's first token (BOS) is context only and is never predicted; counts do not cross
    documents.

    Args:
      documents: each document's ids as stored, BOS and EOS included.
      order: the n of n-gram; 1 or more.
      vocab_size: V; ids lie in [0, V).

    Raises:
      ValueError: order below 1, an id outside the vocabulary, or nothing to predict.

    Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language
    modeling", section 3 (modified Kneser–Ney, eq. 20 to 26).
    Differs from the paper: nothing precedes a document's first token, so an n-gram that starts a
    document has no continuation count and takes its number of occurrences, as in KenLM; an order
    whose counts of counts give no valid discount takes 0.5, 1 and 1.5, as KenLM's fallback.
    """
    if order < 1:
        raise ValueError(f"order is {order}; an n-gram model needs 1 or more, 5 is usual")
    tokens, positions = _concatenate(list(documents), vocab_size)
    if not np.any(positions > 0):
        raise ValueError("no document has two tokens or more, so there is nothing to predict")

    # Going up the orders, so that the distinct n-grams of each give the continuation counts below.
    all_keys, all_counts = [np.arange(vocab_size)], []
    nodes = tokens
    for length in range(2, order + 1):
        ends = np.flatnonzero(positions >= length - 1)
        occurrences = nodes[ends - 1] * vocab_size + tokens[ends]
        keys, first, inverse = np.unique(occurrences, return_index=True, return_inverse=True)
        below = len(all_keys[-1])
        counts = np.bincount(nodes[ends[first]], minlength=below)
        if length > 2:  # a document's first token alone is BOS, which is never predicted
            counts += np.bincount(nodes[positions == length - 2], minlength=below)
        all_keys.append(keys)
        all_counts.append(counts)
        nodes = np.full(len(tokens), -1)
        nodes[ends] = inverse
    predicted = nodes[positions >= max(order - 1, 1)]
    all_counts.append(np.bincount(predicted, minlength=len(all_keys[-1])))

    discounts = tuple(_estimate_discounts(counts) for counts in all_counts)
    shares, backoffs = _discount(np.zeros(vocab_size, int), all_counts[0], discounts[0], 1)
    orders = []
    for n in range(1, order):
        contexts = all_keys[n] // vocab_size
        parts = _discount(contexts, all_counts[n], discounts[n], len(all_keys[n - 1]))
        orders.append(_Order(all_keys[n], *parts))
    unigrams = shares + backoffs[0] / vocab_size
    return NgramModel(order, vocab_size, discounts, unigrams, tuple(orders))


def _concatenate(
    documents: Sequence[np.ndarray], vocab_size: int
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Return all tokens end to end, and each one's position in its own document."""
    tokens = np.concatenate([np.zeros(0, np.int64), *documents], dtype=np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}, outside [0, {vocab_size}); "
            "give the vocab_size of the tokenizer that made them"
        )
    lengths = np.array([len(document) for document in documents], np.int64)
    starts = np.cumsum(lengths) - lengths
    return tokens, np.arange(len(tokens)) - np.repeat(starts, lengths)


def _estimate_discounts(counts: np.ndarray) -> tuple[float, float, float, float]:
    """Return D(0), D(1), D(2) and D(3 or more) of one order, from its counts of counts."""
    _, n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[:5])
    if min(n1, n2, n3) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimates = (0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    # A discount of nought would leave no probability for the tokens that a context never met.
    valid = all(0 < discount <= k for k, discount in enumerate(estimates[1:], start=1))
    return estimates if valid else FALLBACK_DISCOUNTS


def _discount(
    contexts: np.ndarray, counts: np.ndarray, discounts: tuple[float, ...], num_contexts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each n-gram's discounted share of its context, and each context's gamma."""
    removed = np.minimum(np.asarray(discounts)[np.minimum(counts, 3)], counts)
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
    released = np.bincount(contexts, weights=removed, minlength=num_contexts)
    # A context with no continuation (it ends a document) leaves everything to the lower order.
    backoffs = np.divide(released, totals, out=np.ones(num_contexts), where=totals > 0)
    return (counts - removed) / totals[contexts], backoffs


def _find(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the index of each key in sorted_keys, or -1."""
    if len(sorted_keys) == 0:
        return np.full(len(keys), -1)
    found = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[found] == keys, found, -1)
