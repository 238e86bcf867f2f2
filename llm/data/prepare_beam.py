"""Preparation as an Apache Beam pipeline: the files of `prepare`, bit for bit, from many machines.
Every step is a function that `prepare` calls too; what is here is how groups and shards travel."""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from etils import epath

from llm.data.config import DataConfig
from llm.data.disk import read_json_object, remove_leftovers, write_json
from llm.data.grouped import open_split
from llm.data.groups import GroupKey
from llm.data.held_out import finish_splits, write_held_out_sample, write_report
from llm.data.merge import (
    DIGEST_BITS,
    Documents,
    FinishedGroup,
    NearDuplicate,
    Verdicts,
    WrittenGroup,
    distinct_documents,
    in_order,
    most_alike,
    settle,
)
from llm.data.prepare import Prepared, PrepareJob, finish, make_job, open_prepared
from llm.data.prepared import PreparedSplit
from llm.data.rows import BadRow
from llm.data.shard_writer import check_bad_rows, read_marker, write_tokenized_shard
from llm.data.sources import Shard, Split
from llm.data.split_rows import group_plan, plan_seed, plan_size, write_sizes
from llm.data.tokenizers import Tokenizer

# The DirectRunner's own engine. Asked for by its usual name it first tries to download another.
# Functions are sent by their names: what this process was started from need not travel.
_DEFAULT_OPTIONS = ("--runner=FnApiRunner", "--no_save_main_session")
_WHERE = re.compile(r" \[while running '.*", re.DOTALL)
_OWN_ERROR = re.compile(r"^llm\.[\w.]+: (.+)$", re.MULTILINE)


# What travels: a GroupKey as a plain tuple, whose bytes are the same everywhere; a shard to be
# written (directory of its group, number, parts) and one that was (directory, number, marker).
Key = tuple[bool, str, int]
Part = tuple[epath.Path, int, tuple[Shard, ...]]
Written = tuple[epath.Path, int, dict]


class BeamJobError(ValueError):
    """A Beam job failed, with an error of one of its workers."""


class NotSharedError(ValueError):
    """A worker does not see the files of the job."""


def prepare_with_beam(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: epath.PathLike | None = None,
    options: Sequence[str] = (),
) -> Prepared:
    """Return what `prepare` returns, done by a Beam runner; pack plans are made too.

    Workers read the sources and write to `directory`: where they are several machines, both must
    be the same for all, an object store or a shared disk. A job that was killed is started again
    with the same arguments: shards that are whole are kept. Two jobs at once write equal files.

    Args:
      options: Beam's, as on a command line: --runner=DataflowRunner. Without a runner this process
        does it all, and config.num_workers counts for nothing.

    Raises:
      BeamJobError: a worker failed on another machine; or what `prepare` raises, here.
    """
    job = make_job(config, tokenizer, directory)
    if not job.is_done:
        remove_leftovers(job.path)
        whole = {"definition": tokenizer.definition, "settings": tokenizer.settings}
        write_json(_tokenizer_file(job), whole)  # some megabytes: too much for a job's description
        if not options:
            # A failure in this process is told once, by the error that is raised.
            logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        try:
            with beam.Pipeline(options=PipelineOptions([*_DEFAULT_OPTIONS, *options])) as pipeline:
                build(pipeline, job)
        except Exception as error:
            raise _told(error) from error
    return open_prepared(job)


def build(pipeline: beam.Pipeline, job: PrepareJob) -> None:
    """Add all steps of a job to a pipeline."""
    no_sample = pipeline | "No sample" >> beam.Create([None])
    held_out, bad_held_out = _write_shards(pipeline, job, "validation", no_sample)
    sample = (
        held_out
        | "Held-out groups" >> beam.combiners.ToList()
        | "Held-out sample" >> beam.Map(write_held_out_sample, job.held_out_path)
    )
    training, bad_training = _write_shards(pipeline, job, "train", sample)
    written = (held_out, training) | "Written" >> beam.Flatten()
    settled = (
        written
        | "Distinct documents" >> beam.FlatMap(_distinct_by_digest)
        | "Equal documents" >> beam.GroupByKey()
        | "Settle" >> beam.FlatMapTuple(_settle)
    )
    finished = (
        {"written": written | "By key" >> beam.Map(_with_key), "settled": settled}
        | "Of each group" >> beam.CoGroupByKey()
        | "Finish groups" >> beam.MapTuple(functools.partial(_finish, job))
    )
    near_duplicates = (
        finished
        | "Near duplicates" >> beam.FlatMap(_by_held_out)
        | "Most alike" >> beam.CombinePerKey(_most_alike)
        | "Of held-out documents" >> beam.Values()
    )
    bad_rows = (
        (bad_held_out, bad_training)
        | "Bad rows" >> beam.Flatten()
        | "Each once" >> beam.CombinePerKey(_union)
    )
    plans = finished | "Pack plans" >> beam.Map(functools.partial(_make_plan, job.config))
    _ = (
        pipeline
        | "The end" >> beam.Create([job])
        | "Report"
        >> beam.Map(
            _report,
            beam.pvalue.AsList(finished | "Counts" >> beam.Map(_without_near_duplicates)),
            beam.pvalue.AsList(near_duplicates),
            beam.pvalue.AsList(bad_rows),
            beam.pvalue.AsList(plans),
        )
    )


def _write_shards(
    pipeline: beam.Pipeline, job: PrepareJob, split: Split, after: beam.PCollection
) -> tuple[beam.PCollection, beam.PCollection]:
    """Return the split's groups, written once `after` is there, and bad rows by source."""
    names = [name for of_split, name in job.facts if of_split == split]
    markers = (
        pipeline
        | f"Sources of {split}" >> beam.Create(names)
        | f"Cut {split}" >> beam.FlatMap(functools.partial(_cut, job, split))
        | f"Spread {split}" >> beam.Reshuffle()
        | f"Write {split}" >> beam.ParDo(_WriteShard(job), beam.pvalue.AsSingleton(after))
    )
    groups = (
        markers
        | f"Shards of {split}" >> beam.GroupByKey()
        | f"Groups of {split}" >> beam.MapTuple(_gather)
    )
    return groups, markers | f"Bad rows of {split}" >> beam.Map(_bad_rows)


def _cut(job: PrepareJob, split: Split, name: str) -> Iterator[tuple[Key, Part]]:
    """Yield the shards that a split of a source is to have."""
    for group in job.groups(name, job.open_source(split, name)):
        for shard, parts in enumerate(group.shards):
            yield tuple(group.key), (group.directory, shard, parts)


class _WriteShard(beam.DoFn):
    """Writes a shard, unless it is there; yields what `_gather` takes."""

    def __init__(self, job: PrepareJob):
        self._job = job

    def setup(self) -> None:
        file = _tokenizer_file(self._job)
        try:
            self._tokenizer = Tokenizer(**read_json_object(file))
        except FileNotFoundError:
            raise NotSharedError(
                f"a worker does not see {file}, which the start of the job wrote: workers on other "
                "machines need --directory on a shared disk or an object store (gs://…)"
            ) from None
        self._open_source = functools.cache(self._job.open_source)

    def process(self, element: tuple[Key, Part], _after: None) -> Iterator[tuple[Key, Written]]:
        key, (directory, shard, parts) = element
        source = self._open_source(GroupKey(*key).split, GroupKey(*key).source)
        task = self._job.task(GroupKey(*key), directory, shard, parts, source)
        marker = read_marker(task) or write_tokenized_shard(task, self._tokenizer)
        for name in ("documents", "tokens", "bytes"):
            beam.metrics.Metrics.counter("prepare", name).inc(marker[name])
        yield key, (directory, shard, marker)


def _gather(key: Key, shards: Iterable[Written]) -> WrittenGroup:
    shards = list(shards)
    markers = in_order({shard: marker for _, shard, marker in shards})
    return WrittenGroup(GroupKey(*key), shards[0][0], markers)


def _distinct_by_digest(group: WrittenGroup) -> Iterator[tuple[int, Documents]]:
    return distinct_documents(group).by_digest(DIGEST_BITS)


def _settle(_digests: int, groups: Iterable[Documents]) -> Iterator[tuple[Key, Verdicts]]:
    for key, verdicts in settle(list(groups)):
        if len(verdicts.places):
            yield tuple(key), verdicts


def _with_key(group: WrittenGroup) -> tuple[Key, WrittenGroup]:
    return tuple(group.key), group


def _finish(job: PrepareJob, _key: Key, found: dict[str, Iterable]) -> FinishedGroup:
    (written,) = found["written"]
    return finish(job, written, list(found["settled"]))


def _by_held_out(group: FinishedGroup) -> list[tuple[int, NearDuplicate]]:
    return [(near.held_out, near) for near in group.near_duplicates]


def _most_alike(found: Iterable[NearDuplicate]) -> NearDuplicate:
    (best,) = most_alike(found).values()
    return best


def _without_near_duplicates(group: FinishedGroup) -> FinishedGroup:
    return dataclasses.replace(group, near_duplicates=())


def _bad_rows(element: tuple[Key, Written]) -> tuple[str, list[BadRow]]:
    key, (_, _, marker) = element
    return GroupKey(*key).source, [BadRow(*row) for row in marker["bad_rows"]]


def _union(parts: Iterable[Iterable[BadRow]]) -> set[BadRow]:
    """Return the bad rows of a source, each once though both splits read it."""
    return set().union(*parts)


def _make_plan(config: DataConfig, group: FinishedGroup) -> tuple[Key, tuple[int, int]]:
    seed = plan_seed(config, group.key.split)
    plan = group_plan(PreparedSplit(group.directory), config.length_tokens, seed)
    return tuple(group.key), plan_size(plan)


def _report(
    job: PrepareJob,
    finished: list[FinishedGroup],
    near_duplicates: list[NearDuplicate],
    bad_rows: list[tuple[str, set[BadRow]]],
    plans: list[tuple[Key, tuple[int, int]]],
) -> None:
    """Write what tells of all groups: manifests, sizes of plans, and last the report."""
    rows = dict.fromkeys(job.config.sources, ()) | dict(bad_rows)
    for name, of_source in rows.items():
        check_bad_rows(name, sorted(of_source, key=str), job.config.max_bad_rows)
    finish_splits(job.path, finished, job.facts)
    sizes = dict(plans)
    for split, name in job.facts:
        of_split = [sizes[key] for key in sorted(sizes) if key[:2] == (split == "train", name)]
        if len(of_split) > 1:
            seed = plan_seed(job.config, split)
            opened = open_split(job.path / name / split)
            write_sizes(opened, job.config.length_tokens, seed, of_split)
    write_report(job.path, finished, {near.held_out: near for near in near_duplicates}, rows)


def _tokenizer_file(job: PrepareJob) -> epath.Path:
    return job.path / "tokenizer.json"


def _told(error: Exception) -> Exception:
    """Return the error in the words of the house's own one that a worker raised, if it was one."""
    if type(error).__module__.startswith("llm."):  # a runner within this process
        return type(error)(_WHERE.sub("", str(error)))
    own = _OWN_ERROR.findall(str(error))  # of a traceback that came over the network
    return BeamJobError(_WHERE.sub("", own[-1])) if own else error
