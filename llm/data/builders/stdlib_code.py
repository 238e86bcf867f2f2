"""Python source: the standard library of the Python that runs this, without its tests.
A document is a file; split by top-level module or package. The same for a given Python."""

import pathlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from llm.data.builders.grouping import merge_similar, word_shingles
from llm.data.builders.packaged import PackagedCorpus

# Chosen by hand: common in every Python from 3.11 on, of several kinds, about 5% of the text each.
VALIDATION_MODULES = frozenset(
    "argparse calendar configparser csv dataclasses heapq json statistics tarfile textwrap".split()
)
TEST_MODULES = frozenset(
    "fractions gzip ipaddress optparse pprint queue selectors shelve subprocess zipfile".split()
)

_NOT_SOURCE = re.compile(
    r"(site-packages|dist-packages|test|__pycache__"  # others' code, and the 19 MB of tests
    r"|config-.*|_sysconfigdata.*"  # how this machine's Python was built
    r"|pydoc_data)(\.py)?"  # the manual as one generated dictionary of strings
)
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_GENERATED = "gencodec.py"  # tables of 8-bit encodings, one much like another


class StdlibCode(PackagedCorpus):
    """TFDS builder `stdlib_code`: fields text, path and module (the top-level name).

    Its one config is called after the running Python, so that another Python's is not taken
    from the cache for it.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name=f"python{platform.python_version()}", description="The running Python's own."
        )
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("text", "path", "module")}
        return self.make_info(__doc__, features, "PSF")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        splits = split_files(read_files(pathlib.Path(sysconfig.get_path("stdlib"))))
        return {name: iter(enumerate(rows)) for name, rows in splits.items()}

    def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[int, dict]]:
        raise NotImplementedError("the splits hold their examples themselves")


def read_files(root: pathlib.Path) -> list[dict[str, str]]:
    """Return text, path and module of each distinct source file under `root`, sorted by path."""
    rows = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_SOURCE.fullmatch(relative.parts[0]) or _TEST_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few files are in other encodings on purpose
            continue
        if text.strip() and _GENERATED not in text[:500]:
            module = relative.parts[0].removesuffix(".py")
            rows.setdefault(text, {"text": text, "path": relative.as_posix(), "module": module})
    if not rows:
        raise FileNotFoundError(f"this Python keeps no source files of its library in {root}")
    return list(rows.values())


def split_files(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Return the rows by split: whole modules, and with them the modules that copy from them."""
    groups = merge_similar(
        ((row["module"], row["text"]) for row in rows), word_shingles, threshold=0.2, sample_every=4
    )
    held_out = {groups.find(name): "test" for name in TEST_MODULES}
    held_out |= {groups.find(name): "validation" for name in VALIDATION_MODULES}
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        splits[held_out.get(groups.find(row["module"]), "train")].append(row)
    return splits
