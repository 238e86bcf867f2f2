"""Held-out text that nearly occurs in training: what training text is looked up in, and the report
on what was found. The report ends a preparation, of one machine or of many."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath

from llm.data.disk import load_arrays, save_arrays, write_json
from llm.data.grouped import finish_groups
from llm.data.merge import FinishedGroup, NearDuplicate, WrittenGroup, first_occurrences
from llm.data.rows import BadRow

# Held-out documents looked up in training text, spread evenly: 50 MB of sampled shingles.
_MAX_CHECKED_DOCUMENTS = 50_000
_MAX_EXAMPLES = 10


def write_held_out_sample(groups: Sequence[WrittenGroup], path: epath.Path) -> None:
    """Put sampled shingles of distinct held-out documents into one file for all who tokenise.

    Of all held-out documents it holds 16 bytes each at once, of the sampled ones a kilobyte.
    """
    groups = sorted(groups, key=lambda group: group.key)
    digests = [
        np.zeros((0, 2), np.uint64),
        *(g.joined("text_digest")["text_digest"] for g in groups),
    ]
    first = first_occurrences(np.concatenate(digests))
    kept = np.flatnonzero(first == np.arange(len(first)))
    checked = kept[:: max(1, -(-len(kept) // _MAX_CHECKED_DOCUMENTS))]
    ids, samples, counts = [np.zeros(0, np.str_)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    begin = 0
    for columns in (c for g in groups for c in g.columns(("id", "sample", "num_sampled"))):
        count = columns["num_sampled"]
        chosen = checked[(checked >= begin) & (checked < begin + len(count))] - begin
        parts = np.split(columns["sample"], np.cumsum(count)[:-1])
        samples += [parts[document] for document in chosen]
        ids.append(columns["id"][chosen])
        counts.append(count[chosen])
        begin += len(count)
    names = ("id", "sample", "num_sampled")
    arrays = map(np.concatenate, (ids, samples, counts))
    save_arrays(path, {"document": checked, **dict(zip(names, arrays, strict=True))})


def finish_splits(
    path: epath.Path,
    groups: Sequence[FinishedGroup],
    facts: Mapping[tuple[str, str], Mapping[str, object]],
) -> None:
    """Write the manifests of splits of several groups.

    Args:
      path: the folder of everything that was prepared.
      facts: what the manifests are to tell, by split and source.
    """
    for key, mine in _by_split(groups).items():
        if len(mine) > 1:
            of_groups = [{"documents": g.counts["documents"], "digest": g.digest} for g in mine]
            split, source = key
            finish_groups(path / source / split, of_groups, {**facts[key], **_total(mine)})


def write_report(
    path: epath.Path,
    groups: Sequence[FinishedGroup],
    near_duplicates: Mapping[int, NearDuplicate],
    bad_rows: Mapping[str, Iterable[BadRow]],
) -> None:
    """Write report.json, last of all: everything is done.

    Args:
      near_duplicates: by number of the held-out document in the sample.
      bad_rows: each once, by source.
    """
    report: dict[str, dict[str, dict]] = {"train": {}, "validation": {}}
    for (split, source), mine in _by_split(groups).items():
        report[split][source] = _total(mine)
    _add_near_duplicates(report["validation"], path / "held_out.npz", groups, near_duplicates)
    report["bad_rows"] = {
        source: {"count": len(rows), "rows": rows}
        for source, of_source in sorted(bad_rows.items())
        for rows in [sorted(list(dataclasses.astuple(row)) for row in of_source)]
    }
    write_json(path / "report.json", report)


def _by_split(
    groups: Iterable[FinishedGroup],
) -> dict[tuple[str, str], list[FinishedGroup]]:
    found: dict[tuple[str, str], list[FinishedGroup]] = {}
    for group in sorted(groups, key=lambda group: group.key):
        found.setdefault((group.key.split, group.key.source), []).append(group)
    return found


def _total(groups: Sequence[FinishedGroup]) -> dict[str, int]:
    return {name: sum(group.counts[name] for group in groups) for name in groups[0].counts}


def _add_near_duplicates(
    report: dict[str, dict],
    sample: epath.Path,
    groups: Sequence[FinishedGroup],
    near_duplicates: Mapping[int, NearDuplicate],
) -> None:
    """Tell of each held-out split how many documents were looked up, and which were found."""
    saved = load_arrays(sample, ("document", "id"))
    begin, by_split = 0, _by_split(groups)
    for source, counts in report.items():
        end = begin + sum(group.num_written for group in by_split["validation", source])
        numbers = np.flatnonzero((saved["document"] >= begin) & (saved["document"] < end))
        found = [near_duplicates[n] for n in numbers.tolist() if n in near_duplicates]
        counts |= {
            "checked": len(numbers),
            "near_duplicates": len(found),
            "near_duplicate_examples": [
                {
                    "held_out": str(saved["id"][near.held_out]),
                    "training": near.training,
                    "share": near.share,
                }
                for near in found[:_MAX_EXAMPLES]
            ],
        }
        begin = end
