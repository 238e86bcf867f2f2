"""From raw text to prepared splits: tokenise in parallel, drop duplicates, check for leaks.
Files depend on text and tokenizer alone; a killed preparation goes on where it was."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from etils import epath

from llm.data.config import DataConfig, SourceConfig, cache_root
from llm.data.disk import read_json_object, remove_leftovers
from llm.data.grouped import open_split
from llm.data.groups import Group, GroupKey, make_groups
from llm.data.held_out import finish_splits, write_held_out_sample, write_report
from llm.data.merge import (
    FinishedGroup,
    Verdicts,
    WrittenGroup,
    distinct_documents,
    finish_group,
    in_order,
    most_alike,
    settle,
)
from llm.data.prepared import FORMAT_VERSION, PreparedDataError, PreparedSplit, storage_dtype
from llm.data.progress import PrepareProgress
from llm.data.shard_writer import ShardTask, check_bad_rows, is_masked
from llm.data.sources import BadRow, Shard, Source, Split, open_source
from llm.data.tokenizers import Tokenizer
from llm.data.workers import Workers


class OverlapError(ValueError):
    """Too many held-out documents (nearly) occur in the training text."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Prepared data of a config: splits by source name, and a report of how they came about."""

    path: epath.Path
    train: dict[str, PreparedSplit]
    validation: dict[str, PreparedSplit]
    report: dict


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: epath.PathLike | None = None,
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
    job = make_job(config, tokenizer, directory)
    if not job.is_done:
        remove_leftovers(job.path)
        _prepare(job, tokenizer, config.num_workers if num_workers is None else num_workers)
    return open_prepared(job)


@dataclasses.dataclass(frozen=True)
class PrepareJob:
    """What a preparation is to do, in a few kilobytes that every worker may have."""

    config: DataConfig
    path: epath.Path
    # What the manifest of each split tells, held-out splits first, then by name.
    facts: Mapping[tuple[Split, str], Mapping[str, object]]
    vocab_size: int

    @property
    def is_done(self) -> bool:
        return (self.path / "report.json").exists()

    @property
    def held_out_path(self) -> epath.Path:
        return self.path / "held_out.npz"

    def dtype(self, split: Split, name: str) -> str:
        return storage_dtype(self.vocab_size, bool(self.facts[split, name]["masked"]))

    def open_source(self, split: Split, name: str) -> Source:
        return open_source(self.config.sources[name], split, self.config.cache_dir)

    def groups(self, name: str, source: Source) -> list[Group]:
        """Return what a split of a source is prepared in."""
        directory = self.path / name / source.split
        return make_groups(source.split, name, source.shards(), directory)

    def task(
        self,
        key: GroupKey,
        directory: epath.Path,
        shard: int,
        parts: tuple[Shard, ...],
        source: Source,
    ) -> ShardTask:
        """Return the task that writes a shard of a group."""
        held_out_path = self.held_out_path if key.training else None
        return ShardTask(
            key.source, source, parts, directory, shard, self.config.max_bad_rows, held_out_path
        )


def make_job(
    config: DataConfig, tokenizer: Tokenizer, directory: epath.PathLike | None = None
) -> PrepareJob:
    """Return the preparation of a config's data, done or not. Arguments as of `prepare`."""
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one, e.g. data.sources.text.paths")
    facts = {
        (split, name): {
            "source": name,
            "split": split,
            "fingerprint": open_source(source, split, config.cache_dir).fingerprint(),
            "tokenizer": tokenizer.digest,
            "masked": is_masked(source),
        }
        for split in ("validation", "train")
        for name, source in sorted(config.sources.items())
        # Online packing reads training text as it goes.
        if (config.packing == "global" if split == "train" else source.has_validation)
    }
    by_split: dict[str, dict[str, object]] = {"validation": {}, "train": {}}
    for (split, name), of_split in facts.items():
        by_split[split][name] = of_split["fingerprint"]
    text = json.dumps([FORMAT_VERSION, tokenizer.digest, by_split], sort_keys=True)
    root = epath.Path(directory or cache_root(config.cache_dir) / "prepared")
    path = root / hashlib.sha256(text.encode()).hexdigest()[:20]
    return PrepareJob(config, path, facts, tokenizer.vocab_size)


def open_prepared(job: PrepareJob) -> Prepared:
    """Return what a finished preparation left, held against the limits of the job's config."""
    report = _read_report(job.path / "report.json")
    _check_report(report, job.config)
    splits = {
        split: {name: open_split(job.path / name / split) for name in report[split]}
        for split in ("train", "validation")
    }
    return Prepared(job.path, splits["train"], splits["validation"], report)


def _prepare(job: PrepareJob, tokenizer: Tokenizer, num_workers: int) -> None:
    """Do a job on this machine: held-out text first, for training text is looked up in it."""
    sources = {key: job.open_source(*key) for key in job.facts}
    groups = [group for (_, name), source in sources.items() for group in job.groups(name, source)]
    bad_rows: dict[str, dict[BadRow, None]] = {name: {} for name in job.config.sources}
    written: list[WrittenGroup] = []
    progress = PrepareProgress(sum(len(group.shards) for group in groups))
    with progress, Workers(tokenizer, num_workers) as workers:
        for training in (False, True):
            of_split = [group for group in groups if group.key.training == training]
            markers: dict[epath.Path, dict[int, dict]] = {g.directory: {} for g in of_split}
            tasks = [
                job.task(g.key, g.directory, shard, parts, sources[g.key.split, g.key.source])
                for g in of_split
                for shard, parts in enumerate(g.shards)
            ]
            for task, marker in workers.run(tasks):
                # One row comes up in both splits where the hold-out is a hash.
                bad_rows[task.name] |= {BadRow(*row): None for row in marker["bad_rows"]}
                check_bad_rows(task.name, list(bad_rows[task.name]), job.config.max_bad_rows)
                markers[task.directory][task.shard] = marker
                progress.advance(marker)
            written += [
                WrittenGroup(group.key, group.directory, in_order(markers[group.directory]))
                for group in of_split
            ]
            if not training:
                write_held_out_sample(written, job.held_out_path)
    finished = _merge(job, written)
    near = most_alike([near for group in finished for near in group.near_duplicates])
    finish_splits(job.path, finished, job.facts)
    write_report(job.path, finished, near, bad_rows)


def _merge(job: PrepareJob, written: list[WrittenGroup]) -> list[FinishedGroup]:
    settled = dict(settle([distinct_documents(group) for group in written]))
    return [finish(job, group, [settled[group.key]]) for group in written]


def finish(job: PrepareJob, group: WrittenGroup, settled: list[Verdicts]) -> FinishedGroup:
    """Finish a group as the job has it."""
    split = group.key.split, group.key.source
    return finish_group(group, settled, job.dtype(*split), job.facts[split])


def _read_report(path: epath.Path) -> dict:
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
