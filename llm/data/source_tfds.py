"""Sources of kind "tfds": any TFDS data set by name, our own corpora among them.
Read by random access from ArrayRecord (or Parquet) files; TensorFlow is not needed."""

import contextlib
import dataclasses
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import filelock
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import registered

from llm.data.disk import is_store
from llm.data.rows import BadRow, Row, Shard, SourceError, nearest, unknown_field

# Our own builders: packaged corpora that need no data set hub.
OWN_BUILDERS = ("english_prose", "stdlib_code", "film_reviews", "chinese_reviews")
ROWS_PER_SHARD = 4096


@dataclasses.dataclass
class TfdsReader:
    """Rows of one split of a TFDS data set."""

    name: str
    split: str
    cache_dir: str = ""

    def __post_init__(self) -> None:
        self._open: tuple[Any, Any] | None = None  # builder and data source, in this process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def check(self, fields: Sequence[str]) -> None:
        """Check name, config, fields and, where they are known yet, the split."""
        builder = _make_builder(self.name, self.cache_dir)
        known = list(builder.info.features or {})
        for field in fields:
            if field not in known:
                raise unknown_field(f"TFDS {self.name}", field, known)
        if builder.info.splits:  # prepared
            _check_split(builder, self.split)

    def shards(self) -> list[Shard]:
        """Return ranges of rows; prepares the data set if that has not been done."""
        rows = len(self._data()[1])
        starts = range(0, rows, ROWS_PER_SHARD)
        name = f"{self.name}[{self.split}]"
        return [Shard(name, s, min(s + ROWS_PER_SHARD, rows), s + 1) for s in starts]

    def rows(self, shard: Shard, fields: Sequence[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range."""
        del fields
        data = self._data()[1]
        for index in range(shard.start, len(data) if shard.stop is None else shard.stop):
            try:
                example = data[index]
            except Exception as error:  # a damaged record: what it raises depends on the format
                raise SourceError(f"{shard.name} is damaged at row {index + 1}: {error}") from error
            yield Row(example, shard.name, index + 1)

    def fingerprint(self) -> str:
        """Return full name with version, split and its sizes."""
        builder, data = self._data()
        sizes = {name: info.num_bytes for name, info in builder.info.splits.items()}
        return repr((builder.info.full_name, self.split, len(data), sizes))

    def known_groups(self) -> None:
        """Return None: groups are in the rows."""

    def _data(self) -> tuple[Any, Any]:
        if self._open is None:
            builder = _prepared_builder(self.name, self.cache_dir)
            _check_split(builder, self.split)
            try:
                self._open = builder, builder.as_data_source(self.split)
            except (NotImplementedError, ValueError) as error:
                raise SourceError(f"TFDS {self.name} cannot be read: {error}") from error
        return self._open


def _make_builder(name: str, cache_dir: str, **options: Any) -> Any:
    base = name.partition("/")[0].partition(":")[0]
    if base in OWN_BUILDERS:
        importlib.import_module(f"llm.data.builders.{base}")
        options = {**options, "cache_dir": cache_dir}
    try:
        return tfds.builder(name, **options)
    except registered.DatasetNotFoundError as error:
        names = {*tfds.list_builders(with_community_datasets=False), *OWN_BUILDERS}
        hint = nearest(base, sorted(names)) or "; see tfds.list_builders()"
        raise SourceError(f"TFDS knows no data set {name!r}{hint}") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        configs = [config.name for config in tfds.builder_cls(base).BUILDER_CONFIGS]
        hint = f"; its configs are {', '.join(configs[:20])}" if configs else ""
        raise SourceError(f"TFDS cannot make {name!r}{hint}: {error}") from error


def _check_split(builder: Any, split: str) -> None:
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        names = ", ".join(builder.info.splits)
        raise SourceError(f"TFDS {builder.name} has no split {split!r}; it has {names}") from error


def _prepared_builder(name: str, cache_dir: str) -> Any:
    builder = _make_builder(name, cache_dir)
    if builder.info.splits:
        return builder
    builder = _make_builder(name, cache_dir, file_format="array_record")
    with _progress(builder.name), _lock(builder):
        builder = _make_builder(name, cache_dir, file_format="array_record")
        if not builder.info.splits:  # another process may have prepared it meanwhile
            options = tfds.download.DownloadConfig(try_download_gcs=False)
            try:
                builder.download_and_prepare(download_config=options)
            except ImportError as error:
                raise SourceError(
                    f"TFDS {name} needs {error.name} to be prepared, which is not installed here: "
                    "prepare it elsewhere with file_format=array_record, and set TFDS_DATA_DIR"
                ) from error
    return builder


@contextlib.contextmanager
def _progress(name: str) -> Iterator[None]:
    """Keep standard output for the experiment; one line for our own corpora, made in seconds."""
    with contextlib.redirect_stdout(sys.stderr):
        if name not in OWN_BUILDERS:
            yield
            return
        print(f"making the corpus {name}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            try:
                yield
            finally:
                tfds.enable_progress_bar()


def _lock(builder: Any) -> contextlib.AbstractContextManager[Any]:
    root = str(builder.data_dir).partition(f"/{builder.name}")[0]
    if is_store(root):
        return contextlib.nullcontext()  # TFDS itself writes aside and renames
    path = epath.Path(root)
    path.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path / f".{builder.name}.lock")
