"""GGUF files from anywhere: of any bytes, and with headers made to overrun the file or a reader.

HYPOTHESIS_PROFILE=long searches longer (tests/conftest.py).
"""

import pathlib
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.entry import _is_users_mistake
from llm.interop.gguf import load_gguf
from llm.interop.layout import tensors
from llm.interop.weight_tables import GGUF_LLAMA_ROWS
from llm.models.config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=262, width=4, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2,
    mlp_width=4, max_length_tokens=8, vocab_multiple=1,
)  # fmt: skip
FEW = settings(max_examples=40) if settings().derandomize else settings(max_examples=600)


def refusal(path: pathlib.Path) -> str | None:
    """Return the error's one line, None where the file loads."""
    try:
        load_gguf(path)
    except Exception as error:
        assert _is_users_mistake(error), repr(error)
        assert str(path) in str(error) and len(str(error)) < 1500
        return str(error)
    return None


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8)
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_feed_forward_length(4)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", *(f"<{i}>" for i in range(3, CONFIG.vocab_size))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for tensor in tensors(GGUF_LLAMA_ROWS, CONFIG):
        writer.add_tensor(tensor.name, np.zeros(tensor.shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_itself_loads(gguf_file):
    assert refusal(gguf_file) is None


@FEW
@given(
    st.lists(st.tuples(st.integers(0, 5200), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, 12_000) | st.none(),
)
def test_gguf_with_changed_bytes(gguf_file, places, length):
    content = bytearray(gguf_file.read_bytes())
    for place, byte in places:
        content[place % len(content)] = byte
    damaged = gguf_file.with_name("damaged.gguf")
    damaged.write_bytes(content[:length])
    refusal(damaged)


def gguf_of(*fields: bytes, num_tensors: int = 0, tail: bytes = b"") -> bytes:
    counts = struct.pack("<IQQ", 3, num_tensors, len(fields))
    return b"GGUF" + counts + b"".join(fields) + tail


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return text(b"key") + struct.pack("<IIQ", 9, kind, count) + data


def info(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + numbers + struct.pack("<IQ", kind, offset)


HOSTILE_GGUF = {
    "empty": b"",
    "magic alone": b"GGUF",
    "other magic": b"GGML" + b"\0" * 64,
    "fields that are not there": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "tensors that are not there": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    # The library alone loops over these: an element of nothing is no bytes long.
    "array of 2^40 bytes": gguf_of(array(0, 2**40)),
    "array of 2^40 texts": gguf_of(array(8, 2**40)),
    "array of millions": gguf_of(array(0, 2**25, b"\0" * 2**25)),
    "arrays in arrays": gguf_of(array(9, 1, struct.pack("<IQ", 9, 1) * 3000)),
    "unknown kind": gguf_of(text(b"key") + struct.pack("<I", 77)),
    "key beyond the file": gguf_of(struct.pack("<Q", 2**62) + b"key"),
    "key no UTF-8": gguf_of(text(b"\xff") + struct.pack("<IB", 0, 1)),
    "key twice": gguf_of(*[text(b"key") + struct.pack("<IB", 0, 1)] * 2),
    "alignment of zero": gguf_of(text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment of 2^31": gguf_of(text(b"general.alignment") + struct.pack("<II", 4, 2**31)),
    "many dimensions": gguf_of(num_tensors=1, tail=info(b"t", (1,) * 9)),
    "beyond the end": gguf_of(num_tensors=1, tail=info(b"t", (64,)) + b"\0" * 64),
    "offset beyond the end": gguf_of(num_tensors=1, tail=info(b"t", (4,), 0, 2**63) + b"\0" * 64),
    "shape overflows": gguf_of(num_tensors=1, tail=info(b"t", (2**32, 2**32)) + b"\0" * 64),
    "overlap": gguf_of(num_tensors=2, tail=info(b"t", (4,)) + info(b"u", (4,)) + b"\0" * 96),
    "rows no multiple of blocks": gguf_of(num_tensors=1, tail=info(b"t", (5,), 2) + b"\0" * 96),
    "tensor of unknown type": gguf_of(num_tensors=1, tail=info(b"t", (4,), 99) + b"\0" * 96),
}


@pytest.mark.parametrize("kind", HOSTILE_GGUF)
def test_hostile_gguf(tmp_path, kind):
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE_GGUF[kind])
    assert "is damaged or no GGUF file" in refusal(path)
