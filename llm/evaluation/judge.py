"""A classifier of texts that no policy has seen, and what it finds in responses. Third floor."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llm.data.config import SourceConfig
from llm.data.rows import BadRow, tell_rows
from llm.data.sources import describe, open_source
from llm.data.text_classifier import make_text_classifier


class Judge:
    """Tells the label of a text; deterministic."""

    def __init__(self, texts: Sequence[str], labels: Sequence[str], *, by_characters: bool = False):
        self._model = make_text_classifier(by_characters=by_characters)
        self._model.fit(texts, labels)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return the likelier label of each text."""
        return self._model.predict(list(texts)).tolist()

    def agreement(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """Return the share of texts whose label is the one given."""
        return float(np.mean([a == b for a, b in zip(self(texts), labels, strict=True)]))


class LabelledTexts(NamedTuple):
    """Texts with their labels, and the rows that had none."""

    texts: list[str]
    labels: list[str]
    bad_rows: list[BadRow]


def labelled_texts(config: SourceConfig, label_field: str, cache_dir: str = "") -> LabelledTexts:
    """Return texts, or last answers of conversations, with their labels.

    Raises:
      ValueError: no row has a text and a label.
    """
    config = dataclasses.replace(config, kept_fields=(*config.kept_fields, label_field))
    source = open_source(config, "train", cache_dir)
    texts, labels, bad_rows = [], [], []
    for shard in source.shards():
        for document in source.read(shard):
            if isinstance(document, BadRow):
                bad_rows.append(document)
                continue
            label = document.fields.get(label_field)
            if label is None:
                name, _, row = document.id.rpartition(":")
                bad_rows.append(BadRow(name, int(row), f"no field {label_field!r}"))
                continue
            texts.append(document.messages[-1]["content"] if document.messages else document.text)
            labels.append(label.decode() if isinstance(label, bytes) else str(label))
    if not texts:
        raise ValueError(
            f"{describe(config)} has no row with a text and {label_field!r}; "
            + tell_rows(bad_rows, "bad rows")
        )
    return LabelledTexts(texts, labels, bad_rows)


def distinct_n(responses: Iterable[Sequence[int]], n: int) -> float:
    """Return the share of different n-grams of tokens among all of them; 0 where there are none.

    It falls as a policy collapses to few phrases; compare it at equal numbers of n-grams.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.2.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
