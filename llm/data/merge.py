"""After all shards are written: drop exact duplicates over the whole mixture, write each split's
index and manifest, and report what was dropped and what held-out text nearly occurs in training."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from llm.data import shard_writer
from llm.data.disk import written_aside
from llm.data.packing import concatenated_ranges
from llm.data.prepared import finish_split
from llm.data.shard_writer import ShardTask

# Held-out documents looked up in training text, spread evenly: 50 MB of sampled shingles.
_MAX_CHECKED_DOCUMENTS = 50_000
_MAX_EXAMPLES = 10
_INDEX_COLUMNS = ("shard", "record", "num_tokens", "num_targets", "num_bytes")
_MERGED_COLUMNS = (*_INDEX_COLUMNS, "text_digest")
# What there is where nothing is: the columns of no shard at all.
_NO_COLUMNS = {
    "shard": np.zeros(0, np.int32),
    "record": np.zeros(0, np.int64),
    "num_tokens": np.zeros(0, np.int64),
    "num_targets": np.zeros(0, np.int64),
    "num_bytes": np.zeros(0, np.int64),
    "text_digest": np.zeros((0, 2), np.uint64),
    "id": np.zeros(0, np.str_),
    "sample": np.zeros(0, np.uint64),
    "num_sampled": np.zeros(0, np.int64),
    "near_document": np.zeros(0, np.int64),
    "near_id": np.zeros(0, np.str_),
    "near_held_out": np.zeros(0, np.int64),
    "near_share": np.zeros(0, np.float64),
}
_NEAR_COLUMNS = ("near_document", "near_id", "near_held_out", "near_share")


def first_occurrences(
    digests: UInt64[np.ndarray, "documents 2"],
) -> Int64[np.ndarray, " documents"]:
    """Return, for each text digest (a row of two words), the index of its first occurrence."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in order
    ordered = digests[order]
    begins = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def write_held_out_sample(tasks: Sequence[ShardTask], path: pathlib.Path) -> None:
    """Put the sampled shingles of all distinct held-out documents into one file for the workers."""
    columns = _load(tasks, ("text_digest", "sample", "num_sampled"))
    count = len(columns["num_sampled"])
    kept = np.flatnonzero(first_occurrences(columns["text_digest"]) == np.arange(count))
    checked = kept[:: max(1, -(-len(kept) // _MAX_CHECKED_DOCUMENTS))]
    num_sampled = columns["num_sampled"]
    begins = np.cumsum(num_sampled) - num_sampled
    places = concatenated_ranges(begins[checked], num_sampled[checked])
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(
            file,
            document=checked,
            sample=columns["sample"][places],
            num_sampled=num_sampled[checked],
        )


def merge(
    tasks: Mapping[tuple[str, str], Sequence[ShardTask]],
    held_out_path: pathlib.Path,
    dtypes: Mapping[tuple[str, str], str],
    facts: Mapping[tuple[str, str], Mapping[str, object]],
) -> dict[str, dict[str, dict]]:
    """Finish the splits of all sources and return the report on them, by split and source.

    Of equal texts the first is kept, held-out text before training text: a training document
    that equals a held-out one is dropped, whichever source either is from.

    Args:
      tasks: by (split, source name), held-out splits first.
      dtypes: what each split's tokens are stored in.
      facts: what each split's manifest is to tell besides.
    """
    columns = {key: _load(of_split, _MERGED_COLUMNS) for key, of_split in tasks.items()}
    sizes = [len(of_split["num_tokens"]) for of_split in columns.values()]
    ends = dict(zip(columns, np.cumsum(sizes).tolist(), strict=True))
    num_held_out = max(
        (end for (split, _), end in ends.items() if split == "validation"), default=0
    )
    digests = [_NO_COLUMNS["text_digest"], *(c["text_digest"] for c in columns.values())]
    first = first_occurrences(np.concatenate(digests))
    kept = first == np.arange(len(first))

    report: dict[str, dict[str, dict]] = {"train": {}, "validation": {}}
    for (split, name), size in zip(columns, sizes, strict=True):
        run = slice(ends[split, name] - size, ends[split, name])
        index = {column: columns[split, name][column][kept[run]] for column in _INDEX_COLUMNS}
        dropped = first[run][~kept[run]]
        counts = {
            "documents": len(index["num_tokens"]),
            "tokens": int(index["num_tokens"].sum()),
            "bytes": int(index["num_bytes"].sum()),
            "dropped_repeated": len(dropped),
        }
        if split == "train":
            counts["dropped_equal_to_held_out"] = int((dropped < num_held_out).sum())
            counts["dropped_repeated"] -= counts["dropped_equal_to_held_out"]
        of_split = tasks[split, name]
        shards = [shard_writer.read_marker(task)["shard"] for task in of_split]
        finish_split(
            of_split[0].directory, index, shards, dtypes[split, name], facts[split, name] | counts
        )
        report[split][name] = counts
    _report_near_duplicates(report, tasks, held_out_path, kept, ends)
    return report


def _report_near_duplicates(
    report: dict[str, dict[str, dict]],
    tasks: Mapping[tuple[str, str], Sequence[ShardTask]],
    held_out_path: pathlib.Path,
    kept: np.ndarray,
    ends: Mapping[tuple[str, str], int],
) -> None:
    """Add to each held-out split how many of its documents were looked up, and which were found."""
    held_out = [
        task for key, of_split in tasks.items() if key[0] == "validation" for task in of_split
    ]
    held_out_ids = _load(held_out, ("id",))["id"]
    with np.load(held_out_path, allow_pickle=False) as saved:
        checked = saved["document"]
    best: dict[int, tuple[float, str]] = {}  # held-out document -> share, training document
    position = len(held_out_ids)  # of the next training document
    for key, of_split in tasks.items():
        if key[0] != "train":
            continue
        for task in of_split:
            near = _load([task], (*_NEAR_COLUMNS, "num_tokens"))
            for place, name, document, share in zip(*(near[c] for c in _NEAR_COLUMNS), strict=True):
                # A training document that was dropped leaks nothing.
                if kept[position + place] and share > best.get(int(checked[document]), (0, ""))[0]:
                    best[int(checked[document])] = (float(share), str(name))
            position += len(near["num_tokens"])
    begin = 0
    for (split, name), end in ends.items():
        if split != "validation":
            break
        found = {document: best[document] for document in sorted(best) if begin <= document < end}
        report[split][name] |= {
            "checked": int(((checked >= begin) & (checked < end)).sum()),
            "near_duplicates": len(found),
            "near_duplicate_examples": [
                {"held_out": str(held_out_ids[document]), "training": training, "share": share}
                for document, (share, training) in list(found.items())[:_MAX_EXAMPLES]
            ],
        }
        begin = end


def _load(tasks: Sequence[ShardTask], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return columns of the shards, joined."""
    parts: dict[str, list[np.ndarray]] = {name: [_NO_COLUMNS[name]] for name in names}
    for task in tasks:
        with np.load(shard_writer.columns_path(task), allow_pickle=False) as saved:
            for name in names:
                parts[name].append(saved[name])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
