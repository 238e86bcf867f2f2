"""What the words of a text tell of its label: TF-IDF and logistic regression. First floor.

So unlike a language model that it does not share its weaknesses: judges are made of it.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline


def make_text_classifier(*, by_characters: bool = False) -> Pipeline:
    """Return an unfitted classifier of 1- and 2-grams of words, or of 1- to 3-grams of characters.

    Labels weigh alike however rare, or a text that says little would be given the commoner one.
    """
    analyzer = (
        dict(analyzer="char", ngram_range=(1, 3))
        if by_characters
        else dict(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b|!|\?")
    )
    return make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2, **analyzer),
        LogisticRegression(C=4.0, max_iter=1000, class_weight="balanced"),
    )


def labels_are_clear(
    texts: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[Hashable],
    *,
    by_characters: bool = False,
    least_probability: float = 0.6,
    folds: int = 10,
) -> np.ndarray:
    """Return, for each text, whether a classifier fitted on other groups gives its label at least
    that probability."""
    found = cross_val_predict(
        make_text_classifier(by_characters=by_characters),
        texts,
        labels,
        groups=groups,
        cv=GroupKFold(folds),
        method="predict_proba",
    )
    names = np.unique(labels)  # sorted, as scikit-learn orders its columns
    return found[np.arange(len(texts)), np.searchsorted(names, labels)] >= least_probability
