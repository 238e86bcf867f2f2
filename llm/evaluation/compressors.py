"""Baselines any text has without a model: bits per byte under gzip, zstd and xz at their strongest.

Alone they see the held-out bytes only; given the training text they may look all of it up.
"""

import concurrent.futures
import json
import lzma
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence

import zstandard

COMPRESSORS = ("gzip", "zstd", "xz")
GIVEN_TRAINING = "_given_training"
ALL_DOMAINS = "all"

# Ends each document, as EOS does for the model, which pays for that token as well. Not counted in
# the bytes that bits are divided by: those are the text's own, for every predictor.
_DOCUMENT_END = b"\0"
_CHUNK_BYTES = 1 << 24


def compressor_bits_per_byte(
    heldout: Mapping[str, Iterable[str]], training: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return bits per UTF-8 byte of held-out text, by predictor and then by domain.

    Predictors are "gzip", "zstd" and "xz" (the held-out bytes alone) and "gzip_given_training" and
    so on: the size of training and held-out text together, less that of the training text. The
    training text is the whole of it, whatever the domain. A domain's documents are concatenated in
    the order given, each ended by one zero byte; "all" is the domains one after another.

    gzip runs at level 9, zstd at level 22 with long-distance matching, xz at preset 9 | EXTREME.
    The window of zstd and the dictionary of xz cover all the text (up to 2 GiB and 1.5 GiB).
    gzip's window is 32 KiB by its format, so the training text gives it almost nothing.

    Each compressor runs in a process of its own, in about 15 times the text's memory, and reads
    the training text once: xz takes a second or so a megabyte of it.

    Args:
      heldout: documents by domain.
      training: the documents of all domains.

    Raises:
      ValueError: no domain, one without text, or one called "all".
    """
    if not heldout or ALL_DOMAINS in heldout:
        raise ValueError(
            f"held-out domains are {sorted(heldout)}; give at least one, and call none "
            f'"{ALL_DOMAINS}", which stands for all of them together'
        )
    texts, num_bytes = {}, {}
    for domain, documents in heldout.items():
        texts[domain], num_bytes[domain] = _concatenate(documents)
        if not num_bytes[domain]:
            raise ValueError(f"held-out domain {domain!r} has no text; leave it out or fill it")
    texts[ALL_DOMAINS], num_bytes[ALL_DOMAINS] = b"".join(texts.values()), sum(num_bytes.values())
    training_text, _ = _concatenate(training)

    with concurrent.futures.ThreadPoolExecutor(len(COMPRESSORS)) as pool:
        args = [(name, training_text, list(texts.values())) for name in COMPRESSORS]
        sizes = dict(zip(COMPRESSORS, pool.map(_measure_apart, args), strict=True))
    bits = {}
    for which, suffix in (("alone", ""), ("given_training", GIVEN_TRAINING)):
        for name in COMPRESSORS:
            by_domain = zip(texts, sizes[name][which], strict=True)
            bits[name + suffix] = {d: 8 * size / num_bytes[d] for d, size in by_domain}
    return bits


def _concatenate(documents: Iterable[str]) -> tuple[bytes, int]:
    """Return the documents' bytes with an end after each, and how many are the text's own."""
    encoded = [document.encode() for document in documents]
    return b"".join(text + _DOCUMENT_END for text in encoded), sum(map(len, encoded))


def _measure_apart(args: tuple[str, bytes, list[bytes]]) -> dict[str, list[int]]:
    """Run `_measure` in a fresh process, which may fork: this one may hold JAX's threads."""
    # -P: this file's folder stays off the import path, where it could hide other modules.
    command = [sys.executable, "-P", __file__]
    name, training, texts = args
    header = json.dumps({"name": name, "lengths": [len(training), *map(len, texts)]})
    content = b"".join([header.encode(), b"\n", training, *texts])
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"measuring {name} on {len(training)} bytes of training text ended with status "
            f"{done.returncode} (a negative one is a signal: out of memory is -9): "
            + done.stderr.decode(errors="replace")[-2000:]
        )
    return json.loads(done.stdout)


def _measure(name: str, training: bytes, texts: Sequence[bytes]) -> dict[str, list[int]]:
    """Return the compressed sizes of texts: each alone, and what each adds to the training text."""
    alone = [_Stream(name, len(text)).size_with(text) for text in texts]
    # One window for all, so that the differences are the texts' doing alone.
    longest = len(training) + max(map(len, texts))
    if not hasattr(os, "fork"):  # Windows: start again for each
        totals = [_Stream(name, longest, training).size_with(text) for text in (b"", *texts)]
    else:
        stream = _Stream(name, longest, training)
        totals = [_size_in_fork(stream, text) for text in (b"", *texts)]
    return {"alone": alone, "given_training": [total - totals[0] for total in totals[1:]]}


class _Stream:
    """A compressor and the size of what it has given out; the output itself is dropped."""

    def __init__(self, name: str, longest: int, prefix: bytes = b""):
        self._compressor = _COMPRESSORS[name](longest)
        self._size = 0
        self._feed(prefix)

    def _feed(self, text: bytes) -> None:
        for start in range(0, len(text), _CHUNK_BYTES):
            self._size += len(self._compressor.compress(text[start : start + _CHUNK_BYTES]))

    def size_with(self, text: bytes) -> int:
        """Return the size of all that went in and text; the stream cannot be used after."""
        self._feed(text)
        return self._size + len(self._compressor.flush())


def _size_in_fork(stream: _Stream, text: bytes) -> int:
    """Return stream.size_with(text) and leave the stream as it was.

    xz cannot copy its state; a forked process has a copy, and so the training text is read once
    instead of once a domain, to the same size.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, b"%d" % stream.size_with(text))
        finally:
            os._exit(0)  # whatever happened, this copy must not go on as its parent would
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        size = pipe.read()
    os.waitpid(child, 0)
    if not size:
        raise RuntimeError(f"the copy that compressed {len(text)} bytes died; is memory short?")
    return int(size)


def _gzip(longest: int):
    del longest  # the format fixes the window
    return zlib.compressobj(level=9, wbits=16 + zlib.MAX_WBITS)


def _zstd(longest: int):
    parameters = zstandard.ZstdCompressionParameters.from_level(
        zstandard.MAX_COMPRESSION_LEVEL,
        source_size=longest,
        window_log=min(max(longest.bit_length(), zstandard.WINDOWLOG_MIN), 31),
        enable_ldm=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compressobj()


def _xz(longest: int):
    # liblzma takes dictionaries from 4 KiB to 1.5 GiB.
    dictionary_bytes = min(max(1 << longest.bit_length(), 4 << 10), 1536 << 20)
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary_bytes}]
    return lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=filters)


_COMPRESSORS = {"gzip": _gzip, "zstd": _zstd, "xz": _xz}

if __name__ == "__main__":
    header = json.loads(sys.stdin.buffer.readline())
    training, *texts = (sys.stdin.buffer.read(length) for length in header["lengths"])
    json.dump(_measure(header["name"], training, texts), sys.stdout)
