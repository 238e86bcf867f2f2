"""A model from wherever it is: a workdir, a Hugging Face directory, a GGUF file, or SmolLM2."""

import json
from typing import NamedTuple

from etils import epath

from configs.dataclass_config import from_config_dict
from llm.data.tokenizers import Tokenizer, load_tokenizer
from llm.interop.weights import load_weights
from llm.models.config import TransformerConfig
from llm.training.loading import load_params


class LoadedModel(NamedTuple):
    """Parameters are NumPy arrays on the host: put them on the devices once."""

    config: TransformerConfig
    params: dict
    tokenizer: Tokenizer


def load_model(source: str, *, step: int | None = None, ema: bool = False) -> LoadedModel:
    """Return the model of a workdir (its newest good step), a Hugging Face directory, a .gguf file,
    or of the SmolLM2 package, by the name "smollm2".

    Raises:
      FileNotFoundError: there is nothing at `source`, or no such step.
      ValueError: what is there cannot be used; says why.
    """
    path = epath.Path(source)
    if is_workdir(path):
        config = load_model_config(path)
        return LoadedModel(
            config, load_params(path, step, ema=ema).params, load_tokenizer(path / "tokenizer")
        )
    if step is not None or ema:
        raise ValueError(f"{source} is not a workdir: it has no steps and no averaged parameters")
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{source} is neither a workdir nor a Hugging Face directory: it has no config.json"
        )
    found = load_weights(source)
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json: put the model's own beside its weights")
    return LoadedModel(found.config, found.params, found.tokenizer)


def is_workdir(path: epath.PathLike) -> bool:
    """Whether a directory was made by one of our runs, rather than by Hugging Face's tools."""
    file = epath.Path(path) / "config.json"
    try:
        # theirs names its architecture
        return file.exists() and "model_type" not in json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return (epath.Path(path) / "checkpoints").exists()


def load_model_config(workdir: epath.PathLike) -> TransformerConfig:
    """Return the model in a workdir's config.json, whatever stage made it."""
    file = epath.Path(workdir) / "config.json"
    try:
        fields = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if "model" not in fields:
        raise ValueError(f"{file} describes no model: it has {', '.join(fields) or 'nothing'}")
    return from_config_dict(fields["model"], TransformerConfig, f"{file}: model")
