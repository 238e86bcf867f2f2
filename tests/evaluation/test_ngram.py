"""The Kneser–Ney baseline against KenLM, a by-the-book dictionary version and sums done by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.evaluation.ngram import FALLBACK_DISCOUNTS, fit_ngram


def test_probabilities_worked_by_hand():
    bos, a, b, c, eos = range(5)
    model = fit_ngram([np.array([bos, a, b, eos]), np.array([bos, a, c, eos])], 2, vocab_size=5)
    # Too few counts of counts, so D = 0.5, 1, 1.5. Distinct tokens before a, b, c: 1; eos: 2.
    # gamma = (3 * 0.5 + 1) / 5 = 0.5, so p(a) = p(b) = p(c) = 0.5/5 + 0.5/5, p(eos) = 1/5 + 0.5/5.
    assert model.discounts == (FALLBACK_DISCOUNTS, FALLBACK_DISCOUNTS)
    np.testing.assert_allclose(model.unigrams, [0.1, 0.2, 0.2, 0.2, 0.3], rtol=1e-14)
    # p(a | bos) = (2 - 1)/2 + 0.5 * 0.2; p(b | a) = 0.5/2 + 0.5 * 0.2; p(eos | b) = 0.5 + 0.15
    expected = np.log([0.6, 0.35, 0.65])
    np.testing.assert_allclose(model.log_probs(np.array([bos, a, b, eos])), expected, rtol=1e-14)
    # Unseen pair: 0.5 * 0.3. Context that never went on: the unigram itself.
    expected = np.log([0.6, 0.15, 0.2])
    np.testing.assert_allclose(model.log_probs(np.array([bos, a, eos, c])), expected, rtol=1e-14)


# What KenLM says of `_word_documents(300, 1) + [[3, 400]]` (the kenlm 0.3.0 source distribution):
#   lmplz -o 5 --discount_fallback --arpa lm.arpa --text train.txt; query -v word lm.arpa
# Its vocabulary is the 399 words, </s> and <unk>; <s> is never predicted. The last word occurs
# once, because lmplz takes the last n-gram's raw count where its adjusted one should stand.
KENLM_DISCOUNTS = (
    (0.108696, 1.47508, 2.36759),
    (0.683244, 1.22764, 2.24668),
    (0.881657, 1.34451, 1.88633),
    (0.5, 1, 1.5),
    (0.986567, 1.67114, 3),
)
# fmt: off
KENLM_WORDS = [
    3, 7, 51, 360, 123, 63, 42, 299, 95, 266, 267, 7, 53, 373, 58, 9, 64, 49, 348, 41, 290, 34, 68,
    11, 78, 369,
]
KENLM_LOG10 = [
    -0.8911463, -2.8850908, -1.0265584, -1.7376583, -1.1477141, -1.007196, -0.520154, -3.5928972,
    -3.1440492, -1.097047, -1.0279979, -2.2184343, -1.579296, -3.1632552, -2.7921026, -1.2915812,
    -1.0195816, -0.89438474, -3.4934855, -2.6122274, -3.154746, -2.746175, -2.9705882, -2.3629527,
    -0.51866984, -3.2486482, -1.3213387,
]
# fmt: on


def _word_documents(count: int, seed: int, vocab: int = 400) -> list[list[int]]:
    """Return documents of words with a long tail and some memory, the same on every machine."""

    def draw() -> float:
        nonlocal seed
        seed = (seed * 1103515245 + 12345) % 2**31
        return seed / 2**31

    documents = []
    for _ in range(count):
        words, previous = [], 0
        for _ in range(int(draw() * 30)):
            if draw() < 0.75:
                previous = (previous * 7 + int(6 ** draw())) % vocab
            else:
                previous = int(vocab ** draw()) - 1
            words.append(previous)
        documents.append(words)
    return documents


def test_agrees_with_kenlm():
    documents = _word_documents(300, seed=1) + [[3, 400]]
    words = sorted({word for document in documents for word in document})
    ids = {word: rank for rank, word in enumerate(words, start=1)}
    eos = len(words) + 1

    def stored(document: list[int]) -> np.ndarray:
        return np.array([0, *(ids[word] for word in document), eos])

    # Id 0 is BOS as a context and stands for <unk> as a target, so the two vocabularies are alike.
    model = fit_ngram(map(stored, documents), 5, vocab_size=eos + 1)
    np.testing.assert_allclose(np.array(model.discounts)[:, 1:], KENLM_DISCOUNTS, rtol=1e-5)
    log10 = model.log_probs(stored(KENLM_WORDS)) / np.log(10)
    np.testing.assert_allclose(log10, KENLM_LOG10, atol=2e-6)


class DictionaryKneserNey:
    """Chen and Goodman's recursion as printed, one dictionary an order; slow and plain."""

    def __init__(self, documents, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size
        occurrences = Counter(
            tuple(document[end - n : end])
            for document in documents
            for n in range(1, order + 2)
            for end in range(max(n, 2), len(document) + 1)
        )
        initial = Counter(
            tuple(document[:n]) for document in documents for n in range(2, len(document) + 1)
        )
        self.counts = {}
        for n in range(1, order + 1):
            if n == order:
                self.counts[n] = {gram: c for gram, c in occurrences.items() if len(gram) == n}
                continue
            longer = {gram for gram in occurrences if len(gram) == n + 1}
            counts = Counter(gram[1:] for gram in longer)
            counts.update({gram: c for gram, c in initial.items() if len(gram) == n})
            self.counts[n] = counts

    def discount(self, n, count):
        n1, n2, n3, n4 = (sum(c == k for c in self.counts[n].values()) for k in (1, 2, 3, 4))
        estimates = [0, 0.5, 1, 1.5]
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            d = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            if all(0 < d[k] <= k for k in (1, 2, 3)):
                estimates = d
        return estimates[min(count, 3)]

    def probability(self, context, word):
        context = tuple(context)[max(0, len(context) - self.order + 1) :]
        n = len(context) + 1
        followers = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == context}
        shorter = self.probability(context[1:], word) if context else 1 / self.vocab_size
        if not followers:
            return shorter
        total = sum(followers.values())
        gamma = sum(self.discount(n, c) for c in followers.values()) / total
        count = followers.get(word, 0)
        return (count - self.discount(n, count)) / total + gamma * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_agrees_with_the_recursion_on_dictionaries(order):
    documents = [[0, *(w % 9 + 2 for w in d), 1] for d in _word_documents(25, seed=order)]
    model = fit_ngram([np.array(d, np.uint16) for d in documents], order, vocab_size=12)
    reference = DictionaryKneserNey(documents, order, vocab_size=12)
    for document in [*documents[:6], [0, 11, 11, 2, 3, 4, 1], [0, 1], [5, 5, 5, 5, 5, 5, 5, 0]]:
        expected = [
            np.log(reference.probability(document[:end], document[end]))
            for end in range(1, len(document))
        ]
        np.testing.assert_allclose(model.log_probs(np.array(document)), expected, rtol=1e-11)


DOCUMENTS = st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=14), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, order=st.integers(1, 5), context=st.lists(st.integers(0, 7)))
def test_every_distribution_sums_to_one(documents, order, context):
    model = fit_ngram([np.array(d) for d in documents], order, vocab_size=8)
    for seen_or_not in [context, documents[0][:-1], documents[-1][1:]]:
        endings = [np.array([0, *seen_or_not, word]) for word in range(8)]
        total = np.exp([part[-1] for part in model.log_probs_of(endings)]).sum()
        assert total == pytest.approx(1, abs=1e-12)


def test_sums_to_one_on_text_of_some_size():
    documents = [np.array([0, *(w + 2 for w in d), 1]) for d in _word_documents(2000, seed=3)]
    model = fit_ngram(documents, 5, vocab_size=402)
    for context in [[0], documents[7][:-1], documents[8][3:9], [401] * 5, [1, 400, 0, 399]]:
        endings = [np.array([*context, word]) for word in range(402)]
        total = np.exp([part[-1] for part in model.log_probs_of(endings)]).sum()
        assert total == pytest.approx(1, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 99))
def test_documents_in_any_order_give_the_same_model(documents, seed):
    arrays = [np.array(d) for d in documents]
    order = np.random.default_rng(seed).permutation(len(arrays))
    model, shuffled = fit_ngram(arrays, 4, 8), fit_ngram([arrays[i] for i in order], 4, 8)
    scored = np.arange(8)
    np.testing.assert_array_equal(model.log_probs(scored), shuffled.log_probs(scored))


def test_counts_do_not_cross_documents():
    # Across the seam 3 follows 2; within documents it follows 1 alone.
    model = fit_ngram([np.array([0, 1, 2]), np.array([0, 1, 3])], 2, vocab_size=4)
    after_2 = model.log_probs(np.array([2, 3]))
    assert after_2 == np.log(model.unigrams[3])


def test_one_id_may_serve_as_bos_and_eos():
    texts = [[2, 3, 2], [2, 2], [3, 4, 2, 3]]
    apart = fit_ngram([np.array([0, *t, 1]) for t in texts], 3, vocab_size=5)
    one = fit_ngram([np.array([1, *t, 1]) for t in texts], 3, vocab_size=5)
    scored = np.array([2, 3, 4, 2, 3, 1])
    np.testing.assert_array_equal(
        apart.log_probs(np.array([0, *scored])), one.log_probs(np.array([1, *scored]))
    )


def test_large_vocabularies_do_not_overflow_the_keys():
    # Five tokens of 18 bits would need 90 bits; the trie's keys need fewer than 64.
    rng = np.random.default_rng(0)
    small = rng.integers(0, 50, (40, 30))
    spread = rng.choice(200_000, 50, replace=False)
    near = fit_ngram(list(small), 5, vocab_size=200_000)
    far = fit_ngram(list(spread[small]), 5, vocab_size=200_000)
    np.testing.assert_allclose(
        near.log_probs(small[3]), far.log_probs(spread[small[3]]), rtol=1e-13
    )


def test_short_documents_are_scored_like_long_ones():
    model = fit_ngram([np.array([0, 2, 3, 2, 3, 1])], 3, vocab_size=4)
    batch = [np.array([0, 2, 3]), np.array([], int), np.array([0]), np.array([0, 3, 1])]
    parts = model.log_probs_of(batch)
    assert [len(part) for part in parts] == [2, 0, 0, 2]
    np.testing.assert_array_equal(parts[0], model.log_probs(batch[0]))
    np.testing.assert_array_equal(parts[3], model.log_probs(batch[3]))
    assert model.log_probs_of([]) == []


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"from 0 to 9, outside \[0, 9\)"):
        fit_ngram([np.array([0, 9])], 2, vocab_size=9)
    with pytest.raises(ValueError, match="order is 0"):
        fit_ngram([np.array([0, 1])], 0, vocab_size=9)
    with pytest.raises(ValueError, match="nothing to predict"):
        fit_ngram([np.array([0]), np.array([], int)], 2, vocab_size=9)
