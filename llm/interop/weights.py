"""Weights by where they are: a Hugging Face directory, a GGUF file, or SmolLM2 by name."""

import dataclasses
import os
import pathlib

from llm.data.packages import smollm2_file
from llm.interop.checkpoint import Checkpoint
from llm.interop.gguf import load_gguf
from llm.interop.huggingface import load_huggingface
from llm.interop.peft import merge_peft, read_peft_config


def load_weights(source: str | os.PathLike) -> Checkpoint:
    """Return the model of a Hugging Face directory or a .gguf file; "smollm2" fetches its package.

    A directory of PEFT's is merged into the base model that it names.

    Raises:
      FileNotFoundError: there is nothing there.
      ValueError: the model cannot be read; says why.
    """
    path = pathlib.Path(source)
    if str(source) == "smollm2" and not path.exists():
        return load_gguf(smollm2_file())
    if (path / "adapter_config.json").is_file():
        named = read_peft_config(path).get("base_model_name_or_path")
        if not isinstance(named, str) or "\0" in named:
            raise ValueError(f"{path / 'adapter_config.json'} names no base_model_name_or_path")
        if (pathlib.Path(named) / "adapter_config.json").is_file():
            raise ValueError(f"{path} is an adapter of another adapter, {named}: merge that first")
        base = load_weights(named)
        return dataclasses.replace(base, params=merge_peft(path, base.config, base.params))
    if path.is_dir():
        return load_huggingface(path)
    if path.is_file():
        return load_gguf(path)
    raise FileNotFoundError(
        f"{path} does not exist; give a Hugging Face directory, a .gguf file, or smollm2"
    )
