"""Near duplicates between held-out and training text, by MinHash samples of shingles.
`prepare` samples the held-out documents first, then looks every training document up."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt64

from llm.data.packing import concatenated_ranges

# A shingle is 32 consecutive bytes of lower-case text without spaces and punctuation:
# about six words of English, or ten characters of Chinese, which has no spaces to split at.
SHINGLE_BYTES = 32
# Shingles sampled from a held-out document. A share of one half is then estimated to ±4%.
SAMPLED_SHINGLES = 128
# A held-out document is a near duplicate when this share of its shingles is in ONE training text.
NEAR_DUPLICATE_SHARE = 0.5

_NOT_LETTERS = re.compile(r"\W+")
_NOT_ALPHANUMERIC = bytes(byte for byte in range(128) if not chr(byte).isalnum())
# Random 64-bit words: one a byte value, and odd multipliers that tell the halves of a span apart.
_WORDS = np.random.Philox(key=0).random_raw(256 + 2)
_BYTE_WORDS, (_SPAN_FACTOR, _LAST_FACTOR) = _WORDS[:256], _WORDS[256:] | np.uint64(1)
# Longer texts are hashed in parts, so that one needs 8 MB an array.
_PART_BYTES = 2**20


def shingle_hashes(text: str) -> Iterator[UInt64[np.ndarray, " shingles"]]:
    """Yield the 64-bit hashes of all shingles of a text, in parts and with repetitions.

    A text shorter than one shingle is one shingle.
    """
    text = text.lower()
    if not text.isascii():
        text = _NOT_LETTERS.sub("", text)  # slower, but knows 。and “ and non-breaking spaces
    data = text.encode("utf-8", "surrogatepass").translate(None, _NOT_ALPHANUMERIC)
    data = data.ljust(SHINGLE_BYTES, b"\0")
    last = len(data) - SHINGLE_BYTES + 1
    for begin in range(0, last, _PART_BYTES):
        yield _window_hashes(data[begin : min(begin + _PART_BYTES, last) + SHINGLE_BYTES - 1])


def _window_hashes(data: bytes) -> UInt64[np.ndarray, " shingles"]:
    """Hash every window of SHINGLE_BYTES bytes, by joining the hashes of its two halves."""
    hashes = _BYTE_WORDS[np.frombuffer(data, np.uint8)]
    span = 1
    while span < SHINGLE_BYTES:
        hashes = hashes[:-span] * _SPAN_FACTOR + hashes[span:]
        hashes ^= hashes >> np.uint64(29)  # or the high bits would never reach the low ones
        span *= 2
    hashes *= _LAST_FACTOR
    return hashes ^ (hashes >> np.uint64(32))


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutSample:
    """Sampled shingles of held-out documents, to look training texts up in."""

    hashes: UInt64[np.ndarray, " sampled"]  # sorted
    document: Int32[np.ndarray, " sampled"]  # whose shingle each hash is
    num_sampled: Int64[np.ndarray, " documents"]
    maybe: Bool[np.ndarray, " slots"]  # by a hash's top bits: may it be one of `hashes`?

    def near_duplicates(
        self, text: str
    ) -> tuple[Int32[np.ndarray, " found"], Float64[np.ndarray, " found"]]:
        """Return the held-out documents that `text` nearly contains, and the shares shared.

        The share is that of the held-out document's distinct shingles which occur in `text`
        (its containment, not the symmetric Jaccard index: a held-out poem inside a long
        collection counts as leaked), estimated on its MinHash sample and exact for short ones.
        """
        shift = _shift(self.maybe)
        parts = [part[self.maybe[part >> shift]] for part in shingle_hashes(text)]
        hashes = np.unique(np.concatenate(parts))
        first = np.searchsorted(self.hashes, hashes, side="left")
        count = np.searchsorted(self.hashes, hashes, side="right") - first
        found = self.document[concatenated_ranges(first, count)]
        documents, shared = np.unique(found, return_counts=True)
        shares = shared / self.num_sampled[documents]
        near = shares >= NEAR_DUPLICATE_SHARE
        return documents[near], shares[near]


def sample_shingles(text: str) -> UInt64[np.ndarray, " sampled"]:
    """Return the MinHash sample of a text: its SAMPLED_SHINGLES least shingle hashes.

    Source: Broder 1997, "On the resemblance and containment of documents", bottom-k sketches.
    """
    return np.unique(np.concatenate(list(shingle_hashes(text))))[:SAMPLED_SHINGLES]


def make_held_out_sample(samples: Iterable[UInt64[np.ndarray, " _"]]) -> HeldOutSample:
    """Return what to look training texts up in, from the sample of each held-out document."""
    samples = list(samples)
    num_sampled = np.array([len(sample) for sample in samples], np.int64)
    hashes = np.concatenate([np.zeros(0, np.uint64), *samples])
    order = np.argsort(hashes, kind="stable")
    document = np.repeat(np.arange(len(samples), dtype=np.int32), num_sampled)
    # 16 places a hash: 15 of 16 shingles of unrelated text stop there, without a binary search.
    maybe = np.zeros(2 ** max(16, int(16 * len(hashes)).bit_length()), bool)
    maybe[hashes >> _shift(maybe)] = True
    return HeldOutSample(hashes[order], document[order], num_sampled, maybe)


def _shift(table: np.ndarray) -> np.uint64:
    return np.uint64(64 - (len(table).bit_length() - 1))
