"""The header of a GGUF file, walked within the file's bounds before anything reads it: the gguf
library believes every count in it, and a few bytes can make it loop for ever. Interop floor."""

import math
import os
import pathlib
import struct
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# GGUF's value types: bytes of the numbers, by the type's own number; then strings and arrays.
_NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 2**24  # of an array: the largest vocabularies have a million tokens
_MOST_DIMENSIONS = 4  # as in GGML itself
_ALIGNMENT = "general.alignment"


def check_header(path: pathlib.Path) -> None:
    """Check that all that a GGUF file's header counts and points at lies in the file.

    Raises:
      ValueError: it does not; or tensors overlap, or an array has arrays or millions of values.
    """
    with open(path, "rb") as file:
        _Header(file, os.path.getsize(path)).check()


class _Header:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._order = file, size, "<"

    def check(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if not self._number("I") & 0xFFFF:  # the version, in the other order
            self._order = ">"
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(num_fields):
            key, kind = self._string(), self._number("I")
            if key == _ALIGNMENT.encode() and kind == 4:
                alignment = self._number("I")
            else:
                self._skip_value(kind, key)
        tensors = [self._tensor() for _ in range(num_tensors)]
        if not 0 < alignment <= 2**20:
            raise ValueError(f"{_ALIGNMENT} is {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        end = 0
        for offset, size, name in sorted(tensors):
            if offset < end:
                raise ValueError(f"tensor {name!r} overlaps another one")
            end = offset + size
            if start + end > self._size:
                raise ValueError(f"tensor {name!r} ends at {start + end}, beyond the file")

    def _tensor(self) -> tuple[int, int, bytes]:
        """Return a tensor's offset after the header, its bytes and its name."""
        name, num_dimensions = self._string(), self._number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = [self._number("Q") for _ in range(num_dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if (shape[0] if shape else 1) % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[0]}, no multiple of {block}")
        return offset, math.prod(shape) // block * block_bytes, name

    def _skip_value(self, kind: int, key: bytes) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if count > _MOST_VALUES or inner == _ARRAY:
                raise ValueError(f"{key[:80]!r} is an array of arrays, or of {count} values")
            if inner == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._bytes(count * _NUMBER_BYTES[inner])
        else:
            self._bytes(_NUMBER_BYTES[kind])

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _number(self, code: str) -> int:
        return struct.unpack(self._order + code, self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError(f"the header goes on for {count} bytes, beyond the file's end")
        return self._file.read(count)
