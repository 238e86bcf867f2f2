"""Hugging Face directories in and out: config.json, safetensors, tokenizer. Interop floor."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from llm.data.disk import read_json_object
from llm.data.tokenizer_files import load_tokenizer
from llm.data.tokenizers import Tokenizer
from llm.interop.checkpoint import Checkpoint
from llm.interop.export_ledger import check_ledger, write_ledger
from llm.interop.families import FAMILIES, config_from_huggingface, family_named, family_of
from llm.interop.layout import check_params, load_params, read_param, tensors
from llm.interop.mup import fold_mup
from llm.interop.new_directory import new_directory
from llm.interop.safetensors_files import open_safetensors, write_safetensors
from llm.models.config import TransformerConfig


def load_huggingface(directory: str | os.PathLike) -> Checkpoint:
    """Return the model of a Hugging Face directory, sharded or not, weights as float32.

    The tokenizer is None where the directory has no tokenizer.json.

    Raises:
      FileNotFoundError: config.json or the weights are not there.
      ValueError: an architecture or option we do not have (says which we do), a damaged file, or
        tensors that do not fit the config.
    """
    directory = pathlib.Path(directory)
    theirs = _read_config(directory)
    check_ledger(directory)
    try:
        config = config_from_huggingface(theirs)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    family = family_named(theirs["model_type"])
    with open_safetensors(directory) as weights:
        names = family.canonical_names(weights.names, config)
        shapes = {name: weights.shape(theirs) for name, theirs in names.items()}
        params = load_params(
            family.rows, config, shapes, lambda name: weights.read(names[name]), str(directory)
        )
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(directory) if has_tokenizer else None
    return Checkpoint(config, params, tokenizer)


def save_huggingface(
    directory: str | os.PathLike,
    config: TransformerConfig,
    params: dict,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a directory that transformers loads, under its final name only when whole.

    Vocabulary padding is left out. Tensors reach the host one shard at a time.

    Args:
      dtype: "float32" or "bfloat16".
      max_shard_bytes: above it the weights are split into several files with an index.
      origin: which run and step these are, for ledger.json, which has every file's hash too.

    Raises:
      ValueError: the directory exists and is not empty, no Hugging Face family has such a model
        (says what each would need), or the params are not those of the config.
    """
    config, params = fold_mup(config, params)
    model_type = family_of(config)
    check_params(config, params)
    by_name = {tensor.name: tensor for tensor in tensors(FAMILIES[model_type].rows, config)}
    with new_directory(directory) as aside:
        write_safetensors(
            aside,
            {name: tensor.shape for name, tensor in by_name.items()},
            lambda name: read_param(by_name[name], config, params),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
        if tokenizer is not None:
            tokenizer.save(aside)
        write_json(aside / "config.json", _config_json(model_type, config, tokenizer, dtype))
        write_json(
            aside / "generation_config.json", {"do_sample": False} | _special_tokens(tokenizer)
        )
        write_ledger(aside, origin or {})


def _read_config(directory: pathlib.Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no Hugging Face model: it has no config.json")
    return read_json_object(path)


def _config_json(
    model_type: str, config: TransformerConfig, tokenizer: Tokenizer | None, dtype: str
) -> dict:
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        **FAMILIES[model_type].to_theirs(config),
        **_special_tokens(tokenizer),
        # the name of before transformers 4.56, which later ones read, too
        "torch_dtype": dtype,
    }


def _special_tokens(tokenizer: Tokenizer | None) -> dict:
    """Return the special tokens' ids; null where there are none, lest a family's default apply."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def write_json(path: pathlib.Path, value: dict) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
