"""Tokenised documents on disk: ArrayRecord shards, an index, a manifest; random access to tokens.
`prepare` writes such a split; the loader and evaluation read it through `PreparedSplit`."""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Float32, Int, Int32, Int64, UInt

from llm.data.disk import (
    file_facts,
    is_store,
    load_arrays,
    read_json_object,
    save_arrays,
    write_json,
    written_aside,
)
from llm.data.packing import concatenated_ranges

# A document is stored in records of this many tokens, so that a piece of a long one is read
# without the rest: a play of 40,000 tokens is cut into 40 rows of 1,024, each read apart.
RECORD_TOKENS = 4096
# Group size 1: each record is found, checked (Riegeli hashes every chunk) and read by itself.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"
# Set in a stored word whose token carries no loss (masked splits only, always uint32).
_NO_LOSS_BIT = 1 << 31

FORMAT_VERSION = 2


class PreparedDataError(ValueError):
    """Prepared data on disk is missing, damaged, or of another kind than asked for."""


@dataclasses.dataclass(frozen=True)
class StoredDocument:
    """One document as it is stored: tokens with BOS and EOS, and the size of its text."""

    tokens: Sequence[int] | np.ndarray
    num_bytes: int  # UTF-8 bytes of the text that is learnt
    # Per token: may it be a target? None in pretraining, where all are.
    loss_mask: Sequence[bool] | np.ndarray | None = None


def storage_dtype(vocab_size: int, masked: bool) -> str:
    """Return the little-endian type that tokens are stored in."""
    return "<u4" if masked or vocab_size > 2**16 else "<u2"


def write_shard(
    directory: epath.Path, shard: int, documents: Iterable[StoredDocument], dtype: str
) -> dict[str, np.ndarray]:
    """Write one shard file, whole or not at all, and return the columns of its index.

    The bytes depend on the documents alone, so several processes may write the same shard.
    """
    num_tokens, num_targets, num_bytes = [], [], []
    with written_aside(shard_path(directory, shard)) as aside:
        writer = array_record_module.ArrayRecordWriter(str(aside), _WRITER_OPTIONS)
        for document in documents:
            words = _stored_words(document, dtype)
            for begin in range(0, len(words), RECORD_TOKENS):
                writer.write(words[begin : begin + RECORD_TOKENS].tobytes())
            num_tokens.append(len(words))
            num_targets.append(int(loss_mask(words[1:]).sum()))
            num_bytes.append(document.num_bytes)
        writer.close()
    tokens = np.array(num_tokens, np.int64)
    records = -(-tokens // RECORD_TOKENS)
    return {
        "shard": np.full(len(tokens), shard, np.int32),
        "record": np.cumsum(records) - records,
        "num_tokens": tokens,
        "num_targets": np.array(num_targets, np.int64),
        "num_bytes": np.array(num_bytes, np.int64),
    }


def _stored_words(document: StoredDocument, dtype: str) -> np.ndarray:
    tokens = np.asarray(document.tokens)
    limit = _NO_LOSS_BIT if dtype == "<u4" else 2**16
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < limit:
        raise ValueError(
            f"token {tokens.max()} (least {tokens.min()}) does not fit {dtype}; "
            "is vocab_size that of the tokenizer?"
        )
    words = tokens.astype(dtype)
    if document.loss_mask is not None:
        if dtype != "<u4":
            raise ValueError(f"a loss mask needs 32-bit storage, here it is {dtype}; set masked")
        words |= np.where(document.loss_mask, 0, _NO_LOSS_BIT).astype(dtype)
    return words


def shard_path(directory: epath.Path, shard: int) -> epath.Path:
    return directory / f"shard-{shard:05d}.array_record"


def finish_split(
    directory: epath.Path,
    columns: Mapping[str, np.ndarray],
    shards: Sequence[Mapping[str, object]],
    dtype: str,
    details: Mapping[str, object],
) -> str:
    """Write index.npz and then manifest.json, which marks the split as complete.

    Args:
      columns: of all kept documents in order, as `write_shard` returns them.
      shards: size and digest of each shard file, as `file_facts` returns them.
      details: what else the manifest tells: source, tokenizer, bad rows, duplicates.

    Returns:
      The split's digest.
    """
    index = directory / "index.npz"
    save_arrays(index, dict(columns))
    facts = {
        "format": FORMAT_VERSION,
        "dtype": dtype,
        "documents": len(columns["num_tokens"]),
        "tokens": int(columns["num_tokens"].sum()),
        "bytes": int(columns["num_bytes"].sum()),
        "index": file_facts(index),
        "shards": list(shards),
    }
    write_json(directory / "manifest.json", {**facts, **details})
    return manifest_digest(facts)


def write_split(
    directory: epath.PathLike,
    documents: Iterable[StoredDocument],
    vocab_size: int,
    *,
    masked: bool = False,
) -> "PreparedSplit":
    """Write a split of one shard from documents that are tokenised already, and open it.

    With `masked`, documents may bring a `loss_mask`; tokens then take 32 bits each.
    """
    path, dtype = epath.Path(directory), storage_dtype(vocab_size, masked)
    columns = write_shard(path, 0, documents, dtype)
    facts = [file_facts(shard_path(path, 0))]
    finish_split(path, columns, facts, dtype, {"masked": masked})
    return PreparedSplit(path)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of the split, or group of one, that a manifest is of."""
    parts = [manifest["index"]["sha256"], manifest["dtype"]]
    parts += [shard["sha256"] for shard in manifest["shards"]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class PreparedSplit:
    """A split on disk, read at random; only its index is held in memory. Threads may share it."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.manifest = load_manifest(self.path)
        _check_file(self.path / "index.npz", self.manifest["index"], hashed=True)
        index = _load_index(self.path / "index.npz", len(self.manifest["shards"]))
        self._shard, self._record = index["shard"], index["record"]
        self.num_tokens: Int64[np.ndarray, " documents"] = index["num_tokens"]
        # Tokens that are learnt: all but the first, or those of the assistant.
        self.num_targets: Int64[np.ndarray, " documents"] = index["num_targets"]
        self.num_bytes: Int64[np.ndarray, " documents"] = index["num_bytes"]
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        # Prefetch threads share the readers, and not every ArrayRecord release lets them.
        self._lock = threading.Lock()

    @property
    def groups(self) -> "Sequence[PreparedSplit]":
        """The parts that have an index and a pack plan each: here, the split itself."""
        return (self,)

    @property
    def num_documents(self) -> int:
        return len(self.num_tokens)

    @property
    def num_pairs(self) -> Int64[np.ndarray, " documents"]:
        """(input, target) pairs of each document."""
        return np.maximum(self.num_tokens - 1, 0)

    def packed_pairs(self, row_length: int) -> Int64[np.ndarray, " documents"]:
        """Pairs of each document that packing into rows works with.

        Texts are cut at the ends of rows and go on in others; what goes beyond a row of a
        conversation is left out, since a later piece would answer what it does not see.
        """
        if self.manifest["masked"]:
            return np.minimum(self.num_pairs, row_length)
        return self.num_pairs

    @functools.cached_property
    def bytes_per_target(self) -> float:
        """Bytes of text for each token that is to be learnt, of all documents."""
        sums = [(int(g.num_bytes.sum()), int(g.num_targets.sum())) for g in self.groups]
        num_bytes, num_targets = map(sum, zip(*sums, strict=True))
        return num_bytes / max(1, num_targets)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the digests of all files: what the tokens and their order are."""
        return manifest_digest(self.manifest)

    def tokens(self, document: int) -> Int32[np.ndarray, " tokens"]:
        """Return all stored tokens of one document, BOS and EOS included."""
        count = self.num_tokens[document : document + 1]
        words, _ = self.read(np.array([document]), np.zeros(1, np.int64), count)
        return token_ids(words)

    def documents(self) -> Iterator[StoredDocument]:
        """Yield every document as it was stored."""
        for document in range(self.num_documents):
            count = self.num_tokens[document : document + 1]
            words, _ = self.read(np.array([document]), np.zeros(1, np.int64), count)
            mask = loss_mask(words) if self.manifest["masked"] else None
            yield StoredDocument(token_ids(words), int(self.num_bytes[document]), mask)

    def read(
        self,
        doc: Int[np.ndarray, " stretches"],
        start: Int[np.ndarray, " stretches"],
        count: Int[np.ndarray, " stretches"],
    ) -> tuple[UInt[np.ndarray, " words"], Int64[np.ndarray, " stretches"]]:
        """Read many stretches at once: count[i] stored words of document doc[i] from start[i] on.

        Returns:
          words: one array that holds every stretch; `token_ids` and `loss_mask` decode it.
          offsets: where in `words` each stretch begins.
        """
        first = start // RECORD_TOKENS
        num_records = (start + count - 1) // RECORD_TOKENS - first + 1
        place = concatenated_ranges(first, num_records)  # of a record within its document
        doc_of = np.repeat(doc, num_records)
        size = np.minimum(RECORD_TOKENS, self.num_tokens[doc_of] - place * RECORD_TOKENS)
        blobs = self._read_records(self._shard[doc_of], self._record[doc_of] + place)
        words = np.frombuffer(b"".join(blobs), self.manifest["dtype"])
        if len(words) != size.sum():
            raise PreparedDataError(
                f"{self.path} holds {len(words)} tokens where its index says {size.sum()}; "
                "delete the directory and prepare it again"
            )
        before = np.cumsum(size) - size
        first_record = np.cumsum(num_records) - num_records
        return words, before[first_record] + start % RECORD_TOKENS

    def _read_records(self, shards: np.ndarray, records: np.ndarray) -> list[bytes]:
        blobs: list[bytes] = [b""] * len(shards)
        for shard in np.unique(shards).tolist():
            wanted = np.flatnonzero(shards == shard)
            try:
                with self._lock:
                    found = self._reader(shard).read(records[wanted].tolist())
            except RuntimeError as error:  # Riegeli: a hash that does not match
                raise PreparedDataError(
                    f"{shard_path(self.path, shard)} is damaged ({error}); "
                    "delete its directory and prepare it again"
                ) from error
            for index, blob in zip(wanted.tolist(), found, strict=True):
                blobs[index] = blob
        return blobs

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        if shard not in self._readers:
            path = shard_path(self.path, shard)
            if is_store(path):
                raise PreparedDataError(
                    f"{path}: shards are read from a file system; mount the bucket (gcsfuse), and "
                    "name the mounted folder as data.cache_dir"
                )
            _check_file(path, self.manifest["shards"][shard], hashed=False)
            self._readers[shard] = array_record_module.ArrayRecordReader(
                str(path), options=_READER_OPTIONS, file_reader_buffer_size=32768
            )
        return self._readers[shard]


def token_ids(words: UInt[np.ndarray, " words"]) -> Int32[np.ndarray, " words"]:
    """Return the tokens in stored words."""
    if words.dtype.itemsize == 2:
        return words.astype(np.int32)
    return (words & np.uint32(_NO_LOSS_BIT - 1)).astype(np.int32)


def loss_mask(words: UInt[np.ndarray, " words"]) -> Float32[np.ndarray, " words"]:
    """Return 1 where the stored token may be a target, 0 where it may not."""
    if words.dtype.itemsize == 2:
        return np.ones(len(words), np.float32)
    return (words < _NO_LOSS_BIT).astype(np.float32)


def load_manifest(path: epath.Path) -> dict:
    """Return what manifest.json tells of a split or of a group of its shards.

    Raises:
      PreparedDataError: there is none, or it is damaged or of another format.
    """
    try:
        manifest = read_json_object(path / "manifest.json")
    except FileNotFoundError:
        raise PreparedDataError(
            f"{path} holds no prepared split (no manifest.json); run experiments.prepare_data"
        ) from None
    except ValueError as error:
        raise PreparedDataError(
            f"{path}/manifest.json is damaged ({error}); delete {path}"
        ) from None
    if manifest.get("format") != FORMAT_VERSION:
        raise PreparedDataError(
            f"{path} has format {manifest.get('format')!r}, this code reads {FORMAT_VERSION}; "
            "delete it and prepare it again"
        )
    if "groups" in manifest:
        return manifest
    shards = manifest.get("shards")
    files = [manifest.get("index"), *(shards if isinstance(shards, list) else [None])]
    whole = all(isinstance(file, dict) and {"size", "sha256"} <= file.keys() for file in files)
    if not whole or manifest.get("dtype") not in ("<u2", "<u4") or "masked" not in manifest:
        raise PreparedDataError(f"{path}/manifest.json is damaged; delete {path}")
    return manifest


def _load_index(path: epath.Path, num_shards: int) -> dict[str, np.ndarray]:
    names = ("shard", "record", "num_tokens", "num_targets", "num_bytes")
    try:
        index = load_arrays(path, names)
    except Exception as error:  # NumPy and zipfile raise a dozen kinds on what is damaged
        raise PreparedDataError(f"{path} is damaged ({error}); prepare it again") from error
    shapes = {(array.ndim, len(array)) if array.ndim else None for array in index.values()}
    numbers = all(array.dtype.kind == "i" and array.min(initial=0) >= 0 for array in index.values())
    if len(shapes) != 1 or not numbers or index["shard"].max(initial=-1) >= num_shards:
        raise PreparedDataError(f"{path} is damaged; delete its directory and prepare it again")
    return index


def _check_file(path: epath.Path, facts: Mapping[str, object], *, hashed: bool) -> None:
    if not path.exists():
        raise PreparedDataError(f"{path} is missing; delete its directory and prepare it again")
    found = file_facts(path) if hashed else {"size": path.stat().length}
    for name, value in found.items():
        if value != facts[name]:
            raise PreparedDataError(
                f"{path} is damaged: {name} is {value}, its manifest says {facts[name]}; "
                "delete its directory and prepare it again"
            )
