"""One task of preparation: read a few parts of a source, tokenise them, leave one shard on disk.
Runs in worker processes; imports neither JAX nor Grain."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import connection

import numpy as np
from etils import epath

from llm.data.chat import ChatError
from llm.data.config import SourceConfig
from llm.data.disk import file_facts, load_arrays, save_arrays, write_json
from llm.data.duplicates import HeldOutSample, make_held_out_sample, sample_shingles
from llm.data.prepared import StoredDocument, shard_path, storage_dtype, write_shard
from llm.data.sources import BadRow, Document, Shard, Source
from llm.data.tokenizers import Tokenizer

# Texts are tokenised together up to this much: enough to keep the tokenizer's own threads busy.
_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 1024


class BadRowsError(ValueError):
    """A source has more bad rows than data.max_bad_rows."""


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """What becomes one shard of a prepared split. Pickled into a worker process."""

    name: str  # of the source in the config
    source: Source
    parts: tuple[Shard, ...]
    directory: epath.Path  # of its group
    shard: int
    max_bad_rows: int
    # Where the shingles of held-out documents lie, to look training text up in; None = this text
    # is held out itself and its shingles are to be sampled.
    held_out_path: epath.Path | None

    @property
    def masked(self) -> bool:
        return is_masked(self.source.config)


def is_masked(config: SourceConfig) -> bool:
    """Return whether some tokens are not learnt: those of conversations that others say."""
    return config.format != "text"


def init_worker(tokenizer: Tokenizer, alive: connection.Connection) -> None:
    """Prepare a worker process: its tokenizer, no threads beside it, no life after its parent.

    `alive` ends when the parent closes the other end, or dies: a killed parent cannot tell its
    workers, which would wait for tasks for ever.
    """
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def leave_with_parent() -> None:
        connection.wait([alive])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


_tokenizer: Tokenizer  # set once in each worker process by init_worker


def write_in_worker(task: ShardTask) -> dict:
    """Do a task in a process that `init_worker` has prepared."""
    return write_tokenized_shard(task, _tokenizer)


def write_tokenized_shard(task: ShardTask, tokenizer: Tokenizer) -> dict:
    """Write shard file, columns and done marker, and return the marker.

    The files depend on the task alone. The marker is written last; while it is missing the
    shard does not count.

    Raises:
      BadRowsError: this task alone has more bad rows than allowed.
    """
    documents = _DocumentReader(task)
    stored = _tokenized(documents, tokenizer)
    dtype = storage_dtype(tokenizer.vocab_size, task.masked)
    columns = write_shard(task.directory, task.shard, stored, dtype)
    columns |= documents.columns()
    save_arrays(columns_path(task.directory, task.shard), columns)
    marker = {
        "shard": file_facts(shard_path(task.directory, task.shard)),
        "columns": file_facts(columns_path(task.directory, task.shard)),
        "documents": len(columns["num_tokens"]),
        "tokens": int(columns["num_tokens"].sum()),
        "bytes": int(columns["num_bytes"].sum()),
        "bad_rows": [list(dataclasses.astuple(row)) for row in documents.bad_rows],
    }
    write_json(_marker_path(task), marker)
    return marker


def columns_path(directory: epath.Path, shard: int) -> epath.Path:
    return directory / f"shard-{shard:05d}.npz"


def _marker_path(task: ShardTask) -> epath.Path:
    return task.directory / f"shard-{task.shard:05d}.json"


def read_marker(task: ShardTask) -> dict | None:
    """Return the marker of a finished shard; None if it is missing or its files are not whole."""
    try:
        marker = json.loads(_marker_path(task).read_bytes())
        whole = (
            file_facts(shard_path(task.directory, task.shard)) == marker["shard"]
            and file_facts(columns_path(task.directory, task.shard)) == marker["columns"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if whole else None


class _DocumentReader:
    """Yields a task's documents and gathers, on the way, what is to be known of each."""

    def __init__(self, task: ShardTask):
        self._task = task
        self._held_out_ids: list[str] = []
        self._digests: list[bytes] = []
        self._samples: list[np.ndarray] = []
        # Document here, its id, held-out document, share of that one's shingles.
        self._near: list[tuple[int, str, int, float]] = []
        self.bad_rows: list[BadRow] = []

    def __iter__(self) -> Iterator[Document]:
        held_out = _load_held_out(self._task.held_out_path)
        for row in itertools.chain.from_iterable(map(self._task.source.read, self._task.parts)):
            if isinstance(row, BadRow):
                self._leave_out(row)
                continue
            if held_out is None:
                self._samples.append(sample_shingles(row.text))
                self._held_out_ids.append(row.id)
            else:
                for document, share in zip(*held_out.near_duplicates(row.text), strict=True):
                    self._near.append((len(self._digests), row.id, int(document), float(share)))
            self._digests.append(hashlib.sha256(row.text.encode()).digest()[:16])
            yield row

    def refuse(self, document: Document, reason: str) -> None:
        """Make the document that was just yielded a bad row: it cannot be tokenised."""
        self._digests.pop()
        if self._task.held_out_path is None:
            self._samples.pop()
            self._held_out_ids.pop()
        self._near = [near for near in self._near if near[0] < len(self._digests)]
        source, _, row = document.id.rpartition(":")
        self._leave_out(BadRow(source, int(row), reason))

    def _leave_out(self, row: BadRow) -> None:
        self.bad_rows.append(row)
        check_bad_rows(self._task.name, self.bad_rows, self._task.max_bad_rows)

    def columns(self) -> dict[str, np.ndarray]:
        """Return what was gathered: texts' digests, and samples or near duplicates."""
        digests = np.frombuffer(b"".join(self._digests), "<u8").reshape(-1, 2)
        if self._task.held_out_path is None:
            return {
                "text_digest": digests,
                "id": np.array(self._held_out_ids, np.str_),
                "sample": np.concatenate([np.zeros(0, np.uint64), *self._samples]),
                "num_sampled": np.array([len(sample) for sample in self._samples], np.int64),
            }
        return {
            "text_digest": digests,
            "near_document": np.array([near[0] for near in self._near], np.int64),
            "near_id": np.array([near[1] for near in self._near], np.str_),
            "near_held_out": np.array([near[2] for near in self._near], np.int64),
            "near_share": np.array([near[3] for near in self._near], np.float64),
        }


def _tokenized(documents: _DocumentReader, tokenizer: Tokenizer) -> Iterator[StoredDocument]:
    """Yield texts between BOS and EOS, and conversations as the template has them.

    A conversation's size is that of what is learnt of it: the assistant's turns. One that the
    template refuses (two turns of one role, perhaps) is a bad row.
    """
    for is_chat, run in itertools.groupby(documents, lambda document: bool(document.messages)):
        if not is_chat:
            yield from _tokenized_texts((document.text for document in run), tokenizer)
            continue
        for document in run:
            try:
                tokens, mask = tokenizer.encode_chat_masked(document.messages)
            except ChatError as error:
                documents.refuse(document, str(error))
                continue
            learnt = [m["content"] for m in document.messages if m["role"] == "assistant"]
            yield StoredDocument(tokens, sum(len(text.encode()) for text in learnt), mask)


def _tokenized_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[StoredDocument]:
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            tokens = [tokenizer.bos_id, *ids, tokenizer.eos_id]
            yield StoredDocument(tokens, len(text.encode()))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(1)
def _load_held_out(path: epath.Path | None) -> HeldOutSample | None:
    if path is None:
        return None
    saved = load_arrays(path, ("sample", "num_sampled"))
    return make_held_out_sample(np.split(saved["sample"], np.cumsum(saved["num_sampled"])[:-1]))


def check_bad_rows(name: str, bad_rows: Sequence[BadRow], max_bad_rows: int) -> None:
    """Raise a BadRowsError that names the first rows, if there are too many."""
    if len(bad_rows) > max_bad_rows:
        first = "; ".join(map(str, bad_rows[:3]))
        raise BadRowsError(
            f"source {name!r} has more than data.max_bad_rows={max_bad_rows} bad rows, the first: "
            f"{first}. Mend the data, or raise data.max_bad_rows"
        )
