"""From raw text to prepared splits: tokenise in parallel, drop duplicates, check for leaks.
Files depend on text and tokenizer alone; a killed preparation goes on where it was."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from llm.data.config import DataConfig, SourceConfig, cache_root
from llm.data.disk import read_json_object, remove_leftovers, write_json
from llm.data.merge import merge, write_held_out_sample
from llm.data.prepared import FORMAT_VERSION, PreparedDataError, PreparedSplit, storage_dtype
from llm.data.progress import PrepareProgress
from llm.data.shard_writer import (
    ShardTask,
    check_bad_rows,
    init_worker,
    read_marker,
    write_in_worker,
    write_tokenized_shard,
)
from llm.data.sources import BadRow, Shard, Source, open_source
from llm.data.tokenizers import Tokenizer

# Small files are put together into shards of at least this size, and a split has at most so many
# shards (each an open file while training).
_SHARD_BYTES = 16 * 2**20
_MAX_SHARDS = 256


class OverlapError(ValueError):
    """Too many held-out documents (nearly) occur in the training text."""


class WorkerDiedError(RuntimeError):
    """A worker process was killed from outside."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Prepared data of a config: splits by source name, and a report of how they came about."""

    path: pathlib.Path
    train: dict[str, PreparedSplit]
    validation: dict[str, PreparedSplit]
    report: dict


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: str | os.PathLike | None = None,
    num_workers: int | None = None,
) -> Prepared:
    """Return the config's data, tokenised; from disk if this was done before.

    The data lie in a folder of `directory` that is named after a digest of texts and tokenizer:
    other sources or another tokenizer never meet old shards, and changes of weights, lengths,
    seeds or limits tokenise nothing again.

    Args:
      directory: default: `prepared` in the config's cache.
      num_workers: processes that tokenise, default config.num_workers; 0: this one.

    Raises:
      SourceError: a source cannot be read.
      BadRowsError: a source has more than config.max_bad_rows bad rows.
      OverlapError: more than config.max_overlap_fraction of a source's held-out documents
        nearly occur in training text.
    """
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one, e.g. data.sources.text.paths")
    num_workers = config.num_workers if num_workers is None else num_workers
    root = pathlib.Path(directory or cache_root(config.cache_dir) / "prepared")
    sources = _open_sources(config)
    path = root / _key(sources, tokenizer)
    if not (path / "report.json").exists():
        remove_leftovers(path)
        _prepare(path, sources, config, tokenizer, num_workers)
    report = _read_report(path / "report.json")
    _check_report(report, config)
    splits = {
        split: {name: PreparedSplit(path / name / split) for name in report[split]}
        for split in ("train", "validation")
    }
    return Prepared(path, splits["train"], splits["validation"], report)


def _open_sources(config: DataConfig) -> dict[str, dict[str, Source]]:
    """Return the sources by split and, in a fixed order, name. Held-out ones come first."""
    held_out = {
        name: open_source(source, "validation", config.cache_dir)
        for name, source in sorted(config.sources.items())
        if source.has_validation
    }
    train = {}
    if config.packing == "global":  # online packing reads training text as it goes
        for name, source in sorted(config.sources.items()):
            train[name] = open_source(source, "train", config.cache_dir)
    return {"validation": held_out, "train": train}


def _key(sources: Mapping[str, Mapping[str, Source]], tokenizer: Tokenizer) -> str:
    facts = {
        split: {name: source.fingerprint() for name, source in by_name.items()}
        for split, by_name in sources.items()
    }
    text = json.dumps([FORMAT_VERSION, tokenizer.digest, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _prepare(
    path: pathlib.Path,
    sources: Mapping[str, Mapping[str, Source]],
    config: DataConfig,
    tokenizer: Tokenizer,
    num_workers: int,
) -> None:
    held_out_path = path / "held_out.npz"
    tasks: dict[tuple[str, str], list[ShardTask]] = {}
    for split, by_name in sources.items():
        look_up_in = held_out_path if split == "train" else None
        for name, source in by_name.items():
            tasks[split, name] = [
                ShardTask(name, source, parts, path / name / split, shard, config.max_bad_rows,
                          look_up_in)
                for shard, parts in enumerate(group_parts(source.shards()))
            ]  # fmt: skip
    by_split = {
        split: [task for key, of_split in tasks.items() if key[0] == split for task in of_split]
        for split in sources
    }
    bad_rows: dict[str, dict[BadRow, None]] = {name: {} for name in config.sources}
    progress = PrepareProgress(sum(map(len, by_split.values())))
    with progress, _Workers(tokenizer, num_workers) as workers:
        # Held-out text first: training text is looked up in it as it goes by.
        for split in ("validation", "train"):
            for task, marker in workers.run(by_split[split]):
                # One row comes up in both splits where the hold-out is a hash.
                bad_rows[task.name] |= {BadRow(*row): None for row in marker["bad_rows"]}
                check_bad_rows(task.name, list(bad_rows[task.name]), config.max_bad_rows)
                progress.advance(marker)
            if split == "validation":
                write_held_out_sample(by_split[split], held_out_path)
    facts = {
        (split, name): {
            "source": name,
            "split": split,
            "fingerprint": sources[split][name].fingerprint(),
            "tokenizer": tokenizer.digest,
            "masked": tasks[split, name][0].masked,
        }
        for split, name in tasks
    }
    dtypes = {
        key: storage_dtype(tokenizer.vocab_size, of_split[0].masked)
        for key, of_split in tasks.items()
    }
    report = merge(tasks, held_out_path, dtypes, facts)
    bad_rows_report = {
        name: {"count": len(rows), "rows": sorted(list(dataclasses.astuple(row)) for row in rows)}
        for name, rows in sorted(bad_rows.items())
    }
    write_json(path / "report.json", {**report, "bad_rows": bad_rows_report})


def group_parts(parts: Sequence[Shard]) -> list[tuple[Shard, ...]]:
    """Return consecutive parts of a source put together to what becomes one shard each.

    Whole local files are put together up to a useful size; ranges of larger ones stand alone,
    unless there are too many of them.
    """
    groups: list[list[Shard]] = []
    room = 0
    for part in parts:
        whole_file = part.stop is None and os.path.isfile(part.name)
        size = os.path.getsize(part.name) if whole_file else _SHARD_BYTES
        if size > room:
            groups.append([])
            room = _SHARD_BYTES
        groups[-1].append(part)
        room -= size
    each = max(1, -(-len(groups) // _MAX_SHARDS))
    joined = [sum(groups[i : i + each], []) for i in range(0, len(groups), each)]
    return [tuple(group) for group in joined] or [()]


class _Workers:
    """Does tasks in this process, or in others that start when the first task needs them."""

    def __init__(self, tokenizer: Tokenizer, num_workers: int):
        self._tokenizer, self._num_workers = tokenizer, num_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._workers_end, self._own_end = multiprocessing.Pipe(duplex=False)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, exc_type, *details: object) -> None:
        if exc_type is not None:
            self._own_end.close()  # workers leave at once, in the middle of their shards
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._own_end.close()
        self._workers_end.close()

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[tuple[ShardTask, dict]]:
        """Yield each task with its marker once its shard is on disk, finished ones first."""
        pending = []
        for task in tasks:
            marker = read_marker(task)
            if marker is None:
                pending.append(task)
            else:
                yield task, marker
        if not self._num_workers:
            for task in pending:
                yield task, write_tokenized_shard(task, self._tokenizer)
            return
        if pending and self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._num_workers,
                # Spawned, not forked: JAX and the tokenizer have threads by now.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=init_worker,
                initargs=(self._tokenizer, self._workers_end),
            )
        futures = {self._pool.submit(write_in_worker, task): task for task in pending}
        for future in concurrent.futures.as_completed(futures):
            try:
                marker = future.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise WorkerDiedError(
                    f"a process that tokenised {futures[future].name!r} died, perhaps for want of "
                    "memory; start again with fewer data.num_workers: finished shards are kept"
                ) from error
            yield futures[future], marker


def _read_report(path: pathlib.Path) -> dict:
    report = read_json_object(path)
    if not all(isinstance(report.get(part), dict) for part in ("train", "validation", "bad_rows")):
        raise PreparedDataError(f"{path} is damaged; delete {path.parent} and prepare it again")
    return report


def _check_report(report: dict, config: DataConfig) -> None:
    """Hold the report against the limits of this config, which may be stricter than the last."""
    for name, bad_rows in report["bad_rows"].items():
        rows = [BadRow(*row) for row in bad_rows["rows"]]
        check_bad_rows(name, rows, config.max_bad_rows)
    for split in ("validation", "train"):
        for name, counts in report[split].items():
            if counts["documents"] == 0:
                raise ValueError(_nothing_left(name, split, counts, config.sources[name]))
    for name, counts in report["validation"].items():
        found, checked = counts["near_duplicates"], counts["checked"]
        if found > config.max_overlap_fraction * checked:
            examples = "; ".join(
                f"{example['share']:.0%} of {example['held_out']} in {example['training']}"
                for example in counts["near_duplicate_examples"][:3]
            )
            raise OverlapError(
                f"{found} of {checked} held-out documents of source {name!r} nearly occur in "
                f"training text, more than data.max_overlap_fraction="
                f"{config.max_overlap_fraction}: {examples}. Remove them, set group_field so that "
                "copies fall on one side of the split, or raise data.max_overlap_fraction"
            )


def _nothing_left(name: str, split: str, counts: dict, source: SourceConfig) -> str:
    dropped = sum(count for key, count in counts.items() if key.startswith("dropped"))
    if split == "train":
        return f"source {name!r} has no training text ({dropped} duplicates dropped); see its paths"
    return (
        f"source {name!r} has no held-out text ({dropped} duplicates dropped): "
        f"validation_fraction={source.validation_fraction} of its groups left none; raise "
        f"data.sources.{name}.validation_fraction, or set it to 0 to hold nothing out"
    )
