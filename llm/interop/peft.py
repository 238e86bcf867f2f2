"""LoRA adapters in the directories of Hugging Face's PEFT: out of our factors, and merged in.
Interop floor."""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from llm.data.disk import read_json_object
from llm.interop.export_ledger import write_ledger
from llm.interop.families import FAMILIES, family_of
from llm.interop.huggingface import write_json
from llm.interop.layout import Tensor, axis_sizes, rearrange, tensors
from llm.interop.new_directory import new_directory
from llm.interop.safetensors_files import open_file
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of adapter_config.json that change what an adapter means, and the values that we read.
_PATTERN = re.compile(r"\^?[\w.\\]*\w\$?")
_PLAIN = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none"}


def save_peft(
    directory: str | os.PathLike,
    model: Transformer,
    params: dict,
    base_model: str,
    *,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write the low-rank factors of an adapted model as a PEFT adapter of its base model.

    GPT-2's fused projection gets the factors of its parts side by side, at the sum of their ranks.

    Args:
      base_model: where the base model is, for `transformers` to find.
      origin: which run and step these are, for ledger.json, which has every file's hash too.

    Raises:
      ValueError: the model has no factors, no Hugging Face family has such a model, or the
        directory exists and is not empty.
    """
    adapter, family = model.adapter, family_of(model.config)
    if not adapter.rank:
        raise ValueError("this model has no low-rank factors: adapter.rank is 0")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    arrays: dict[str, np.ndarray] = {}
    modules, ranks = set(), {}
    for tensor in tensors(FAMILIES[family].rows, model.config):
        pair = _factors(tensor, flat, adapter.rank)
        if pair is None:
            continue
        if tensor.row.in_experts:
            raise ValueError(
                f"PEFT has no form for the factors of {tensor.name}: transformers holds experts "
                "side by side; merge them (export a whole model), or adapt attention alone"
            )
        module = tensor.name.removesuffix(".weight")
        ending = ".".join(module.split(".")[-2:])  # GPT-2 has a c_proj in each half of a layer
        modules.add(ending)
        if pair[0].shape[0] != adapter.rank:
            ranks[ending] = pair[0].shape[0]
        for letter, factor in zip("AB", pair, strict=True):
            arrays[f"{_PREFIX}{module}.lora_{letter}.weight"] = np.ascontiguousarray(factor)
    config = _PLAIN | {
        "base_model_name_or_path": base_model,
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "fan_in_fan_out": family == "gpt2",  # its layers hold inputs by outputs
        "rank_pattern": ranks,
        "alpha_pattern": {m: adapter.alpha * rank / adapter.rank for m, rank in ranks.items()},
        "inference_mode": True,
    }
    with new_directory(directory) as aside:
        safetensors.numpy.save_file(arrays, aside / WEIGHTS, metadata={"format": "pt"})
        write_json(aside / CONFIG, config)
        write_ledger(aside, origin or {})


def merge_peft(directory: str | os.PathLike, config: TransformerConfig, params: dict) -> dict:
    """Return the base model's parameters with a PEFT adapter added: kernel + alpha / r · B·A.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: it is of a kind that we do not have, or has factors for modules of no row.
    """
    directory = pathlib.Path(directory)
    theirs = read_peft_config(directory)
    with open_file(directory / WEIGHTS) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    found = {tensor.name: tensor for tensor in tensors(FAMILIES[family_of(config)].rows, config)}
    flat, sizes = flax.traverse_util.flatten_dict(params, sep="/"), axis_sizes(config)
    flat = {path: np.array(x, np.float32) for path, x in flat.items()}
    for name in sorted(arrays):
        match = re.fullmatch(re.escape(_PREFIX) + r"(.*)\.lora_A\.weight", name)
        if match is None:
            if ".lora_B." in name:
                continue
            raise ValueError(f"{directory}: {name} is not a low-rank factor; merge it with PEFT")
        tensor = found.get(f"{match[1]}.weight")
        if tensor is None:
            raise ValueError(f"{directory}: {match[1]} is no module of the base model")
        a, b = arrays[name], arrays.get(name.replace("lora_A", "lora_B"), np.zeros(0))
        if not (a.ndim == b.ndim == 2 and len(a) == b.shape[1]) or (
            len(b) * a.shape[1] != math.prod(tensor.shape)
        ):
            raise ValueError(
                f"{directory}: the factors of {match[1]} have shapes {a.shape} and {b.shape}; "
                f"their product must have that of the base model's, {tensor.shape}"
            )
        delta = _scale(theirs, match[1]) * (b.astype(np.float32) @ a.astype(np.float32))
        delta = delta.T if theirs.get("fan_in_fan_out") else delta
        parts = np.split(delta.reshape(tensor.shape), len(tensor.places), axis=-1)
        for part, (path, index) in zip(parts, tensor.places, strict=True):
            part = rearrange(part, tensor.row.their_axes, tensor.row.our_axes, sizes)
            flat[path][index] += part
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def read_peft_config(directory: str | os.PathLike) -> dict:
    """Return adapter_config.json, checked to be of a kind that `merge_peft` merges."""
    file = pathlib.Path(directory) / CONFIG
    config = read_json_object(file)
    for field, plain in _PLAIN.items():
        if config.get(field, plain) != plain:
            raise ValueError(
                f"{file} has {field}={config[field]!r}; only plain LoRA ({field}={plain!r}) is "
                "read: merge it into its base model with PEFT first"
            )
    numbers = [config.get("r"), config.get("lora_alpha")]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        # Patterns are regular expressions there; one of those can run for ever.
        if not isinstance(patterns, dict) or not all(map(_PATTERN.fullmatch, patterns)):
            raise ValueError(f"{file}: {name} must be an object whose keys are names of modules")
        numbers += patterns.values()
    if not all(type(x) in (int, float) and 0 < x < 1e9 for x in numbers):
        raise ValueError(f"{file}: r, lora_alpha and their patterns must be positive numbers")
    return config


def _factors(
    tensor: Tensor, flat: dict[str, np.ndarray], rank: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return A [rank inputs] and B [outputs rank] of a tensor; None if none of its parts has any.

    Parts side by side have ranks of their own: A is stacked and B block-diagonal.
    """
    pairs = []
    for path, index in tensor.places:
        parent = path.removesuffix("/kernel")
        pair = [flat.get(f"{parent}/lora_{x}") for x in "ab"]
        if pair[0] is not None:
            a, b = (np.asarray(x[index] if index else x, np.float32) for x in pair)
            pairs.append((a.reshape(-1, rank).T, b.reshape(rank, -1).T))
        else:
            pairs.append(None)
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    if len(pairs) == 1:
        return pairs[0]
    outputs = tensor.shape[-1] // len(pairs)
    a = np.concatenate([pair[0] for pair in present])
    b = np.zeros((tensor.shape[-1], len(a)), np.float32)
    column = 0
    for part, pair in enumerate(pairs):
        if pair is not None:
            b[part * outputs : (part + 1) * outputs, column : column + rank] = pair[1]
            column += rank
    return a, b


def _scale(config: dict, module: str) -> float:
    """Return alpha / rank of a module, by the patterns that name it or its last parts."""

    def value(patterns: dict, default: float) -> float:
        for pattern, given in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return given
        return default

    alpha = value(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / value(config.get("rank_pattern") or {}, config["r"])
