"""GGUF files in: llama.cpp's container of weights, metadata and tokenizer. Interop floor."""

import contextlib
import dataclasses
import os
import pathlib

import gguf
import numpy as np

from llm.interop.checkpoint import Checkpoint
from llm.interop.gguf_header import check_header
from llm.interop.gguf_tokenizer import tokenizer_from_metadata
from llm.interop.layout import load_params
from llm.interop.weight_tables import GGUF_LLAMA_ROWS
from llm.models.config import TransformerConfig
from llm.models.positions import rotary_frequencies

# Divisors of the rotary frequencies, which is how llama.cpp stores Llama 3's scaling.
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """An open GGUF file: metadata by key, tensors by name, dequantised when read."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        with damage_named(path):
            check_header(path)
            reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def get(self, key: str, default=None):
        """Return the value of a metadata key as a Python value."""
        field = self._fields.get(key)
        if field is None:
            return default
        with damage_named(self.path):
            value = field.contents()
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            # 1e-5 was stored as 9.99999974e-06: take back the decimal number that was meant
            value = float(str(np.float32(value)))
        return value

    def need(self, key: str):
        """Return the value of a metadata key.

        Raises:
          ValueError: the file does not have it.
        """
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path}: the metadata has no {key!r}")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, slowest axis first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32."""
        tensor = self._tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: {name} is of type {tensor.tensor_type.name}, which the gguf library "
                "cannot dequantise; use a file of type Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, F16 or F32"
            ) from error


def load_gguf(file: str | os.PathLike) -> Checkpoint:
    """Return the model of a GGUF file, dequantised to float32, with its tokenizer.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an architecture, option or tokenizer we do not have, or a damaged file.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    source = GGUFFile(path)
    with damage_named(path):
        config = _read_config(source)
        shapes = {name: source.shape(name) for name in source.names if name != _ROPE_FACTORS}
        params = load_params(GGUF_LLAMA_ROWS, config, shapes, source.read, str(path))
        tokenizer = tokenizer_from_metadata(source.get, str(path))
    return Checkpoint(config, params, tokenizer)


def _read_config(source: GGUFFile) -> TransformerConfig:
    _check_supported(source)
    names = set(source.names)
    if "token_embd.weight" not in names:
        raise ValueError(f"{source.path}: the tensor token_embd.weight is missing")
    width, num_heads = (
        source.need("llama.embedding_length"),
        source.need("llama.attention.head_count"),
    )
    num_kv_heads = source.get("llama.attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise ValueError(f"{source.path}: the number of heads differs by layer; supported: one")
    head_dim = source.get("llama.attention.key_length", width // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if source.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{source.path}: {key}={source.get(key)} differs from the head width {head_dim}; "
                "supported: the same"
            )
    qkv_bias, out_bias = "blk.0.attn_q.bias" in names, "blk.0.attn_output.bias" in names
    config = TransformerConfig(
        vocab_size=source.shape("token_embd.weight")[0],
        width=width,
        num_layers=source.need("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=source.need("llama.feed_forward_length"),
        max_length_tokens=source.need("llama.context_length"),
        attention_bias="all" if out_bias else "qkv" if qkv_bias else "none",
        mlp_bias="blk.0.ffn_up.bias" in names,
        norm_epsilon=source.need("llama.attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in names,
        rope_theta=source.get("llama.rope.freq_base", 10_000.0),
    )
    return _with_rope_scaling(config, source)


def _check_supported(source: GGUFFile) -> None:
    architecture = source.need("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{source.path}: architecture {architecture!r} is not supported; supported: 'llama'"
        )
    if source.get("llama.expert_count", 0):
        raise ValueError(f"{source.path}: a mixture of experts; supported: dense models")
    if source.get("split.count", 1) > 1:
        raise ValueError(
            f"{source.path} is one of {source.get('split.count')} parts; merge them with "
            "llama-gguf-split --merge"
        )


def _with_rope_scaling(config: TransformerConfig, source: GGUFFile) -> TransformerConfig:
    """Return the config with the file's rotary scaling: a factor, or divisors of each frequency."""
    kind = source.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{source.path}: rope scaling {kind!r} is not supported; supported: linear"
        )
    if kind == "linear":
        factor = source.need("llama.rope.scaling.factor")
        config = dataclasses.replace(config, rope_scaling="linear", rope_factor=factor)
    if _ROPE_FACTORS not in source.names:
        return config
    divisors = source.read(_ROPE_FACTORS)
    scaled = dataclasses.replace(
        config,
        rope_scaling="llama3",
        rope_factor=float(divisors.max()),
        # the same in every release of Llama 3.1 to 3.3, and not in the file
        rope_low_frequency_factor=1.0,
        rope_high_frequency_factor=4.0,
        rope_original_length_tokens=8192,
    )
    expected = rotary_frequencies(config) / rotary_frequencies(scaled)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{source.path}: {_ROPE_FACTORS} is not Llama 3's rotary scaling; supported: that alone"
        )
    return scaled


@contextlib.contextmanager
def damage_named(path: pathlib.Path):
    """Turn what a library raises on a damaged file into one clear error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the tokenizers library are no Exceptions
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise  # it is one
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged or no GGUF file ({text:.300}); fetch it again"
        ) from error
