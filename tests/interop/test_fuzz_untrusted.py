"""Models from anywhere: config.json, safetensors, GGUF, tokenizers and adapters of any content
load, or are one error that names the place.

HYPOTHESIS_PROFILE=long searches longer (tests/conftest.py).
"""

import json
import pathlib
import shutil
import struct
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.entry import _is_users_mistake
from experiments.loading import load_model
from llm.data.tokenizer_files import load_tokenizer
from llm.data.tokenizer_training import byte_tokenizer
from llm.interop.huggingface import save_huggingface
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, param_shapes

TOKENIZER = byte_tokenizer()
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, width=4, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2,
    mlp_width=4, max_length_tokens=8, vocab_multiple=1,
)  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FEW = settings(max_examples=40) if settings().derandomize else settings(max_examples=600)


def make_directory() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="untrusted_")) / "model"
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(Transformer(CONFIG))
    )
    save_huggingface(folder, CONFIG, zeros, TOKENIZER)
    (folder / "ledger.json").unlink()  # anybody's directory: nothing vouches for its files
    return folder


@pytest.fixture(scope="module")
def model():
    folder = make_directory()
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture
def copy(model, tmp_path):
    return pathlib.Path(shutil.copytree(model, tmp_path / "copy"))


def refusal(path: pathlib.Path, load=load_model) -> str | None:
    """Return the error's one line, None where the path loads."""
    try:
        load(str(path))
    except Exception as error:
        assert _is_users_mistake(error), repr(error)
        message = str(error)
        assert str(path) in message or str(path) == getattr(error, "filename", None), message
        assert len(message) < 1500
        return message
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([0, -1, 10**12, 10**30, 1e400, "%d", "\ud800", "a" * 10**4]),
    lambda each: st.lists(each, max_size=3)
    | st.dictionaries(st.text(max_size=4), each, max_size=2),
)  # fmt: skip


def paths_in(value, path=()) -> list[tuple]:
    """Return the paths of all members of a JSON value, long lists and vocabularies left out."""
    found = [path] if path else []
    if isinstance(value, dict | list) and len(value) < 40:
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            found += paths_in(member, (*path, key))
    return found


def changed(value, path: tuple, new):
    """Return a JSON value with the member at a path replaced, or left out where new is `...`."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def rewrite(file: pathlib.Path, whole: dict, draw: tuple) -> None:
    """Change one member of a JSON file; or, one time in ten, all of it."""
    place, new, raw = draw
    if place % 10 == 0:
        file.write_bytes(raw if new is ... else json.dumps(new).encode())
        return
    paths = paths_in(whole)
    file.write_text(json.dumps(changed(whole, paths[place % len(paths)], new)))


DRAWS = st.tuples(st.integers(0, 10**6), JSON | st.just(...), st.binary(max_size=8))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_json_files_of_any_content(model, name):
    file = model / name
    before = file.read_bytes() if file.exists() else b'{"eos_token": {"content": "<|eos|>"}}'
    whole = json.loads(before)
    load = load_model if name == "config.json" else load_tokenizer

    @FEW
    @given(DRAWS)
    def search(draw):
        rewrite(file, whole, draw)
        refusal(model, load)

    try:
        search()
    finally:
        if name == "special_tokens_map.json":
            file.unlink()
        else:
            file.write_bytes(before)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 0},
        {"hidden_size": 10**9},
        {"hidden_size": "%d", "num_attention_heads": 1},
        {"num_attention_heads": 0},
        {"vocab_size": 2**31 - 1},
        {"vocab_size": 10**30},
        {"head_dim": 2.0},
        {"tie_word_embeddings": "no"},
        {"rope_scaling": [1]},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10**400},
        {"rms_norm_eps": "small"},
        {"quantization_config": "q"},
        {"model_type": ["llama"]},
        {"model_type": "qwen2", "layer_types": ["sliding_attention"], "num_hidden_layers": 10**9},
    ],
    ids=str,
)
def test_configs_of_absurd_sizes_and_types(copy, values):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    assert refusal(copy)


# --- safetensors ----------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2, 2), begin=0, end=16, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "no header": b"\1\0",
    "header beyond the file": safetensors({}, length=10**6),
    "header of 2^63 bytes": safetensors({}, length=2**63),
    "header of all bits": safetensors({}, length=2**64 - 1),
    "header no JSON": safetensors(b"{"),
    "header no object": safetensors([1]),
    "header no UTF-8": safetensors(b'{"\xff": 1}'),
    "header deep": safetensors(b'{"a":' * 5000),
    "tensor no object": safetensors({"a": 1}),
    "unknown type": safetensors({"a": entry(dtype="F31")}),
    "offsets beyond the end": safetensors({"a": entry((4, 2), end=32)}),
    "offsets backwards": safetensors({"a": entry(begin=16, end=0)}),
    "offsets negative": safetensors({"a": entry(begin=-16, end=0)}),
    "offsets too large": safetensors({"a": entry(begin=2**64 - 16, end=2**64)}),
    "shape of other bytes": safetensors({"a": entry((3, 2))}),
    "shape negative": safetensors({"a": entry((-2, -2))}),
    "shape overflows": safetensors({"a": entry((2**32, 2**32), end=0)}),
    "shape overflows to the size": safetensors({"a": entry((2**62 + 1, 4), end=16)}),
    "overlap": safetensors({"a": entry(), "b": entry()}),
    "hole": safetensors({"a": entry((2,), 8, 16)}),
    "bytes left over": safetensors({"a": entry()}, b"\0" * 32),
    "name twice": safetensors(
        b'{"a": {"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b' "a": {"dtype":"F32","shape":[1,4],"data_offsets":[0,16]}}'
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors(copy, kind):
    (copy / WEIGHTS).write_bytes(HOSTILE[kind])
    assert refusal(copy)


@FEW
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
def test_safetensors_with_changed_bytes(model, places):
    whole = (model / WEIGHTS).read_bytes()
    content = bytearray(whole)
    for place, byte in places:
        content[place % len(content)] = byte
    (model / WEIGHTS).write_bytes(content)
    try:
        refusal(model)
    finally:
        (model / WEIGHTS).write_bytes(whole)


@pytest.mark.parametrize(
    "index",
    [
        b"[", b"\xff", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "../model.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": ""}}', b'{"weight_map": {"a": ".."}}', b'{"weight_map": {}}',
        b'{"weight_map": {"a": "missing.safetensors"}}', b'{"weight_map": {"a": "a\\u0000b"}}',
        b'{"weight_map": {"a": ["model.safetensors"]}}', b'{"weight_map":' + b"[" * 5000,
        b'{"weight_map": {"a": "model.safetensors"}}', b'{"weight_map": {"a": "config.json"}}',
    ],
    ids=lambda index: index[:50].decode(errors="replace"),
)  # fmt: skip
def test_hostile_indices(copy, index):
    (copy / INDEX).write_bytes(index)
    assert refusal(copy)


def test_a_pytorch_checkpoint_is_not_read(copy):
    (copy / WEIGHTS).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert "pytorch_model.bin, a pickle that could run code" in refusal(copy)
    # Given by itself it is no GGUF file, and nothing else is tried.
    assert "no GGUF file" in refusal(copy / "pytorch_model.bin")
    assert not pathlib.Path("hacked").exists()


# --- Adapters -------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": {"q": 1}}
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def write_adapter(folder: pathlib.Path, a=(1, 4), b=(4, 1), **fields) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | fields))
    sizes = [4 * int(np.prod(a)), 4 * int(np.prod(b))]
    header = {
        FACTOR.format("A"): entry(a, 0, sizes[0]),
        FACTOR.format("B"): entry(b, sizes[0], sum(sizes)),
    }
    content = safetensors(header, b"\0" * sum(sizes))
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_adapters_of_any_content(model, tmp_path):
    adapter = tmp_path / "adapter"
    base = {"base_model_name_or_path": str(model)}
    write_adapter(adapter, **base)
    assert refusal(adapter) in (None, f"{adapter} has no tokenizer.json")  # it merges
    for fields in (
        {"r": "1"}, {"r": 0}, {"r": None}, {"lora_alpha": float("nan")}, {"rank_pattern": [1]},
        {"rank_pattern": {"(": 1}}, {"rank_pattern": {"(a+)+$": 1}}, {"alpha_pattern": {"q": "x"}},
        {"peft_type": "IA3"}, {"base_model_name_or_path": None}, {"base_model_name_or_path": "\0"},
        {"base_model_name_or_path": str(adapter)}, {"a": (2, 4)}, {"a": (1, 5)}, {"b": (4, 1, 1)},
    ):  # fmt: skip
        write_adapter(adapter, **base | fields)
        assert refusal(adapter), fields
    write_adapter(adapter, **base)
    for kind in HOSTILE.values():
        (adapter / "adapter_model.safetensors").write_bytes(kind)
        assert refusal(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert refusal(adapter)
