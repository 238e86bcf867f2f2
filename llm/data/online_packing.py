"""Packing on the fly, for streams without an end or too long to prepare. Rows then depend on the
number of hosts, and the state is more than one integer: where there is a choice, pack globally."""

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from etils import epath

from llm.data.disk import is_store
from llm.data.loader import Batch, local_sequences
from llm.data.mixture import Mixture, make_mixture
from llm.data.packing import permutation
from llm.data.shard_writer import check_bad_rows
from llm.data.sources import BadRow, Document, Source
from llm.data.tokenizers import Tokenizer

# Rows that Grain's first-fit packing fills at a time: more of them waste less, and wait longer.
_OPEN_ROWS = 64

log = logging.getLogger(__name__)


class OnlineStateError(ValueError):
    """The saved state of an online stream is missing, or belongs to another set-up."""


@dataclasses.dataclass(frozen=True)
class OnlineSetup:
    """What the rows of an online stream depend on; a saved state fits only an equal one."""

    row_length: int
    global_batch_sequences: int
    seed: int
    weights: dict[str, float]
    host_index: int
    host_count: int
    max_bad_rows: int


class OnlineBatches(Iterator[Batch]):
    """Batches as from `make_batches`, of rows packed while documents come in.

    `seek` works from a journal in `state_dir`, one line a batch (on an object store, one object),
    written before the batch is handed out: whatever cursor a checkpoint holds, its state is there.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        tokenizer: Tokenizer,
        setup: OnlineSetup,
        *,
        prefetch: int = 4,
        state_dir: str | os.PathLike | None = None,
        keeps_journal: bool = True,  # of the processes that load the same, one does
    ):
        local_sequences(setup.global_batch_sequences, setup.host_index, setup.host_count)
        self._setup, self._keeps_journal = setup, keeps_journal
        dataset = _HostRows(sources, tokenizer, setup)
        self._iterator = iter(
            grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
        )
        self._start = self._iterator.get_state()
        self._cursor = 0
        self._journal = None
        if state_dir is not None:
            name = f"online-host-{setup.host_index:05d}.jsonl"
            self._journal = epath.Path(state_dir) / name

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._cursor += self._setup.global_batch_sequences
        if self._journal is not None and self._keeps_journal:
            self._write_state(json.dumps(self.get_state()) + "\n")
        return {**batch, "cursor": np.uint32(self._cursor)}

    def get_state(self) -> dict[str, Any]:
        """Return what `set_state` takes to go on after the last batch, as JSON can hold it."""
        return {
            "cursor": self._cursor,
            "setup": dataclasses.asdict(self._setup),
            "stream": self._iterator.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
          OnlineStateError: it was taken with another number of hosts, or other settings.
        """
        setup = dataclasses.asdict(self._setup)
        for name, value in setup.items():
            saved = state["setup"][name]
            if saved != value and name != "max_bad_rows":
                remedy = "restart with the same, or use data.packing='global', which any number of"
                raise OnlineStateError(
                    f"online packing was saved with {name}={saved} and cannot go on with "
                    f"{name}={value}: {remedy} hosts can go on with"
                )
        self._iterator.set_state(state["stream"])
        self._cursor = state["cursor"]

    def seek(self, cursor: int) -> None:
        """Go on as if exactly `cursor` rows had been consumed by all hosts.

        Raises:
          OnlineStateError: the journal has no state for it, or one of another set-up.
        """
        if cursor == 0:
            self._iterator.set_state(self._start)
            self._cursor = 0
            return
        self.set_state(self._find_state(int(cursor)))

    def close(self) -> None:
        """Stop prefetching."""
        self._iterator.close()

    def _write_state(self, line: str) -> None:
        if is_store(self._journal):  # which cannot append: an object a batch
            _entry(self._journal, self._cursor).write_text(line)
            return
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a") as file:
            file.write(line)

    def _find_state(self, cursor: int) -> dict[str, Any]:
        if self._journal is None:
            raise OnlineStateError(
                f"online packing cannot go to cursor {cursor} without a state_dir that holds its "
                "journal; use data.packing='global' where data can be prepared"
            )
        # Host 0's journal too: a host that was not there before has none of its own.
        for path in (self._journal, self._journal.with_name("online-host-00000.jsonl")):
            found = None
            written = _entry(path, cursor) if is_store(path) else path
            if written.exists():
                for line in written.read_text(encoding="utf-8").splitlines():
                    if line.startswith(f'{{"cursor": {cursor},'):
                        found = json.loads(line)
            if found is not None:
                return found
        raise OnlineStateError(f"{self._journal} has no state for cursor {cursor}; start anew")


def _entry(journal: epath.Path, cursor: int) -> epath.Path:
    return journal.with_suffix("") / f"{cursor:012d}.json"


class _HostRows(grain.IterDataset):
    """This host's slices of the batches: rows of each source, mixed by weight."""

    def __init__(self, sources: Mapping[str, Source], tokenizer: Tokenizer, setup: OnlineSetup):
        super().__init__()
        self.setup = setup
        self.mixture = make_mixture({name: setup.weights[name] for name in sorted(setup.weights)})
        self.rows = [
            grain.experimental.FirstFitPackIterDataset(
                _Pieces(name, sources[name], tokenizer, setup),
                length_struct={"tokens": setup.row_length, "targets": setup.row_length},
                num_packing_bins=_OPEN_ROWS,
                seed=setup.seed,
            )
            for name in self.mixture.names
        ]

    def __iter__(self) -> "_HostRowsIterator":
        return _HostRowsIterator([iter(rows) for rows in self.rows], self.mixture, self.setup)


class _HostRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: list[grain.DatasetIterator], mixture: Mixture, setup: OnlineSetup):
        super().__init__(rows)
        self._rows, self._mixture = rows, mixture
        self._num_local = setup.global_batch_sequences // setup.host_count
        self._num_read = 0

    def __next__(self) -> Batch:
        source, _ = self._mixture.locate(self._num_read + np.arange(self._num_local))
        rows = [next(self._rows[index]) for index in source.tolist()]
        self._num_read += self._num_local
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        segment_ids = columns["tokens_segment_ids"]
        return {
            "tokens": columns["tokens"],
            "targets": columns["targets"],
            "loss_weights": (segment_ids > 0).astype(np.float32),
            "segment_ids": segment_ids,
            "positions": columns["tokens_positions"],
        }

    def get_state(self) -> dict[str, Any]:
        return {"num_read": self._num_read, "sources": [rows.get_state() for rows in self._rows]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._num_read = state["num_read"]
        for rows, saved in zip(self._rows, state["sources"], strict=True):
            rows.set_state(saved)


class _Pieces(grain.IterDataset):
    """This host's documents of one source, tokenised and cut to the row length, over and over."""

    def __init__(self, name: str, source: Source, tokenizer: Tokenizer, setup: OnlineSetup):
        super().__init__()
        self.name, self.source, self.tokenizer, self.setup = name, source, tokenizer, setup

    def __iter__(self) -> "_PiecesIterator":
        return _PiecesIterator(self)


class _PiecesIterator(grain.DatasetIterator):
    """State: how often the source has been read, which part and document of it, which piece."""

    def __init__(self, pieces: _Pieces):
        super().__init__()
        self._dataset = pieces
        self.set_state({"epoch": 0, "part": 0, "document": 0, "piece": 0})

    def get_state(self) -> dict[str, Any]:
        return dict(self._place)

    def set_state(self, state: dict[str, Any]) -> None:
        self._place = dict(state)
        self._documents = self._read_from(state["epoch"], state["part"], state["document"])
        self._tokens: np.ndarray | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        length = self._dataset.setup.row_length
        if self._tokens is None:
            self._tokens = self._next_tokens()
        begin = self._place["piece"] * length
        piece = self._tokens[begin : begin + length + 1]
        if begin + length + 1 >= len(self._tokens):
            self._tokens = None
            self._place = {**self._place, "document": self._place["document"] + 1, "piece": 0}
        else:
            self._place = {**self._place, "piece": self._place["piece"] + 1}
        return {"tokens": piece[:-1], "targets": piece[1:]}

    def _next_tokens(self) -> np.ndarray:
        epoch, part, index, document = next(self._documents)
        if (epoch, part, index) != tuple(self._place[n] for n in ("epoch", "part", "document")):
            self._place = {"epoch": epoch, "part": part, "document": index, "piece": 0}
        tokenizer = self._dataset.tokenizer
        ids = tokenizer.encode(document.text)
        return np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)

    def _read_from(
        self, epoch: int, part: int, index: int
    ) -> Iterator[tuple[int, int, int, Document]]:
        """Yield this host's documents and their places, from one place on, for ever."""
        name, source, setup = self._dataset.name, self._dataset.source, self._dataset.setup
        parts = source.shards()
        # Whole parts to each host where there are enough, else every n-th document.
        by_part = len(parts) >= setup.host_count
        mine = slice(setup.host_index, None, setup.host_count)
        everything = slice(None)
        for now in itertools.count(epoch):
            order = permutation(len(parts), "online", setup.seed, now)
            order = order[mine if by_part else everything]
            bad_rows: list[BadRow] = []
            found = False
            for place in range(part if now == epoch else 0, len(order)):
                documents = self._good(source.read(parts[order[place]]), name, bad_rows)
                chosen = itertools.islice(documents, *_bounds(everything if by_part else mine))
                for number, document in enumerate(chosen):
                    found = True
                    if (now, place) != (epoch, part) or number >= index:
                        yield now, place, number, document
            if not found and now > epoch:
                raise OnlineStateError(f"source {name!r} has no text for host {setup.host_index}")

    def _good(self, rows: Iterator, name: str, bad_rows: list[BadRow]) -> Iterator[Document]:
        for row in rows:
            if isinstance(row, BadRow):
                log.warning("bad row skipped: %s:%d %s", row.source, row.row, row.reason)
                bad_rows.append(row)
                check_bad_rows(name, bad_rows, self._dataset.setup.max_bad_rows)
            else:
                yield row


def _bounds(part: slice) -> tuple[int | None, int | None, int | None]:
    return part.start, part.stop, part.step
