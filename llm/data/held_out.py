"""Held-out text that nearly occurs in training: what training text is looked up in, and the report
on what was found. The report ends a preparation, of one machine or of many."""

import dataclasses
from collections.abc import Mapping, Sequence

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


def write_report(
    path: epath.Path,
    groups: Sequence[FinishedGroup],
    near_duplicates: Mapping[int, NearDuplicate],
    bad_rows: Mapping[str, Sequence[BadRow]],
    facts: Mapping[tuple[str, str], Mapping[str, object]],
) -> None:
    """Write the manifests of splits of several groups, and last report.json: all is done.

    Args:
      path: the folder of everything that was prepared.
      groups: all there are.
      near_duplicates: by number of the held-out document in the sample.
      bad_rows: each once, by source.
      facts: what the manifests are to tell, by split and source.
    """
    groups = sorted(groups, key=lambda group: group.key)
    report: dict[str, dict[str, dict]] = {"train": {}, "validation": {}}
    for split, source in facts:
        mine = [group for group in groups if (group.key.split, group.key.source) == (split, source)]
        counts = {name: sum(group.counts[name] for group in mine) for name in mine[0].counts}
        if len(mine) > 1:
            of_groups = [
                {"documents": group.counts["documents"], "digest": group.digest} for group in mine
            ]
            finish_groups(path / source / split, of_groups, {**facts[split, source], **counts})
        report[split][source] = counts
    _add_near_duplicates(report["validation"], path / "held_out.npz", groups, near_duplicates)
    report["bad_rows"] = {
        source: {"count": len(rows), "rows": sorted(list(dataclasses.astuple(row)) for row in rows)}
        for source, rows in sorted(bad_rows.items())
    }
    write_json(path / "report.json", report)


def _add_near_duplicates(
    report: dict[str, dict],
    sample: epath.Path,
    groups: Sequence[FinishedGroup],
    near_duplicates: Mapping[int, NearDuplicate],
) -> None:
    """Tell of each held-out split how many documents were looked up, and which were found."""
    saved = load_arrays(sample, ("document", "id"))
    begin = 0
    for source, counts in report.items():
        written = [
            g.num_written for g in groups if (g.key.split, g.key.source) == ("validation", source)
        ]
        end = begin + sum(written)
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
