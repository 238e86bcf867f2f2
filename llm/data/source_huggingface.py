"""Sources of kind "huggingface": data sets of the Hugging Face hub, or local ones, by name.
The library `datasets` is optional and loaded only here."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from llm.data.rows import BadRow, Row, Shard, SourceError, unknown_field

ROWS_PER_SHARD = 4096


@dataclasses.dataclass
class HuggingFaceReader:
    """Rows of one split of a data set, memory-mapped by `datasets`."""

    name: str  # "owner/name" or "owner/name:config"
    split: str

    def __post_init__(self) -> None:
        self._data: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def check(self, fields: Sequence[str]) -> None:
        """Check that `datasets` is there, the name is known, and, if told, split and fields."""
        datasets = _import_datasets()
        path, _, config = self.name.partition(":")
        try:
            info = datasets.load_dataset_builder(path, config or None).info
        except Exception as error:  # the hub's many ways of saying no
            raise SourceError(f"Hugging Face data set {self.name!r}: {error}") from error
        if info.splits and self.split.partition("[")[0] not in info.splits:
            names = ", ".join(info.splits)
            raise SourceError(f"{self.name} has no split {self.split!r}; it has {names}")
        for field in fields:
            if info.features and field not in info.features:
                raise unknown_field(self.name, field, list(info.features))

    def shards(self) -> list[Shard]:
        """Return ranges of rows; downloads the data set if that has not been done."""
        rows = len(self._load())
        starts = range(0, rows, ROWS_PER_SHARD)
        name = f"{self.name}[{self.split}]"
        return [Shard(name, s, min(s + ROWS_PER_SHARD, rows), s + 1) for s in starts]

    def rows(self, shard: Shard, fields: Sequence[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range."""
        data = self._load()
        present = [field for field in fields if field in data.column_names]
        if fields and not present:  # where the features were not told before the download
            raise unknown_field(self.name, fields[0], data.column_names)
        data = data.select_columns(present)
        for index in range(shard.start, len(data) if shard.stop is None else shard.stop):
            yield Row(data[index], shard.name, index + 1)

    def fingerprint(self) -> str:
        """Return name, split and the fingerprint that `datasets` keeps."""
        return repr((self.name, self.split, self._load()._fingerprint))

    def known_groups(self) -> None:
        """Return None: groups are in the rows."""

    def _load(self) -> Any:
        if self._data is None:
            path, _, config = self.name.partition(":")
            self._data = _import_datasets().load_dataset(path, config or None, split=self.split)
        return self._data


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            'a source of kind "huggingface" needs the library `datasets`: '
            "pip install 'ontogeny-llm[huggingface]'"
        ) from error
    return datasets
