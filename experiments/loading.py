"""A model from wherever it is: a workdir, a Hugging Face directory, a GGUF file, or SmolLM2."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from etils import epath

from configs.dataclass_config import from_config_dict
from llm.data.disk import read_json_object
from llm.data.tokenizer_files import load_tokenizer, read_template
from llm.data.tokenizers import Tokenizer
from llm.interop.layout import check_params
from llm.interop.peft import CONFIG as PEFT_CONFIG
from llm.interop.weights import load_weights
from llm.models.adapters import merge_params
from llm.models.config import AdapterConfig, TransformerConfig
from llm.models.transformer import Transformer
from llm.training.files import absolute, is_local
from llm.training.loading import LoadedParams, load_params
from llm.training.manifests import list_steps, read_ledger

T = TypeVar("T")


class LoadedModel(NamedTuple):
    """Parameters are NumPy arrays on the host: put them on the devices once."""

    config: TransformerConfig
    params: dict
    tokenizer: Tokenizer
    # Of a workdir's model, its run's name and what the ledger says of its step.
    origin: Mapping[str, Any] = types.MappingProxyType({})


class Start(NamedTuple):
    """What a later stage begins from. `params()` is None where the stage has its own by now."""

    config: TransformerConfig
    tokenizer: Tokenizer
    params: Callable[[], dict | None]


def load_model(source: str, *, step: int | None = None, ema: bool = False) -> LoadedModel:
    """Return the model of a workdir (its newest good step), a Hugging Face directory, a .gguf file,
    or of the SmolLM2 package, by the name "smollm2". An adapter is merged into its kernels.

    Raises:
      FileNotFoundError: there is nothing at `source`, or no such step.
      ValueError: what is there cannot be used; says why.
    """
    path = absolute(source)
    if is_workdir(path):
        fields = read_config(path)
        check_writes(source, fields)
        part = "policy" if "rollout" in fields else ""  # of a run with several models
        config = load_model_config(path)
        loaded = load_params(path, step, part=part, ema=ema)
        params, origin = loaded.params, origin_of(path, loaded, ema=ema)
        adapter = load_section(path, "adapter", AdapterConfig, default=AdapterConfig())
        if adapter != AdapterConfig():
            params = merge_params(Transformer(config, adapter=adapter), params)
        try:
            check_params(config, params)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return LoadedModel(config, params, load_tokenizer(path / "tokenizer"), origin)
    if not is_local(path):
        raise FileNotFoundError(f"{source} is not a workdir; other weights must be local")
    if step is not None or ema:
        raise ValueError(f"{source} is not a workdir: it has no steps and no averaged parameters")
    if path.is_dir() and not any((path / n).exists() for n in ("config.json", PEFT_CONFIG)):
        raise FileNotFoundError(
            f"{source} is neither a workdir nor a Hugging Face directory: it has no config.json"
        )
    found = load_weights(source)
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json: put the model's own beside its weights")
    return LoadedModel(found.config, found.params, found.tokenizer)


def check_writes(source: str, fields: Mapping[str, Any]) -> None:
    """Raise a ValueError where the fields of a workdir's config are those of a reward model."""
    if "calibration_bins" in fields:
        raise ValueError(f"{source} holds a reward model, which scores texts and writes none")


def origin_of(workdir: epath.PathLike, loaded: LoadedParams, *, ema: bool) -> dict[str, Any]:
    """Return which parameters these are: run, the ledger's row of the step, and their digest."""
    rows = {row["step"]: row for row in read_ledger(workdir)}
    row = rows.get(loaded.step, {"step": loaded.step})
    return {"run": absolute(workdir).name, "ema": ema} | row | {"params_digest": loaded.digest}


def load_start(source: str, workdir: epath.PathLike, chat_template: str = "") -> Start:
    """Return the model that a stage in `workdir` starts from, or the one it goes on with.

    It comes without dropout, which is the stage's to set. A stage that has checkpoints needs its
    source no more, which may be gone. `chat_template` names a file whose Jinja source replaces the
    tokenizer's own.
    """
    template = read_template(chat_template) if chat_template else None
    if list_steps(workdir):
        config = dataclasses.replace(load_model_config(workdir), dropout_rate=0.0)
        found = LoadedModel(config, {}, load_tokenizer(epath.Path(workdir) / "tokenizer"))
        params = lambda: None  # noqa: E731
    else:
        found = load_model(source)
        config = dataclasses.replace(found.config, dropout_rate=0.0)
        params = lambda: found.params  # noqa: E731
    tokenizer = found.tokenizer.with_chat_template(template) if template else found.tokenizer
    return Start(config, tokenizer, params)


def is_workdir(path: epath.PathLike) -> bool:
    """Whether a directory was made by one of our runs, rather than by Hugging Face's tools."""
    file = absolute(path) / "config.json"
    try:
        # theirs names its architecture
        return file.exists() and "model_type" not in read_json_object(file)
    except ValueError:
        return (epath.Path(path) / "checkpoints").exists()


def load_model_config(workdir: epath.PathLike) -> TransformerConfig:
    """Return the model in a workdir's config.json, whatever stage made it."""
    return load_section(workdir, "model", TransformerConfig)


def load_section(
    workdir: epath.PathLike, name: str, section_type: type[T], default: T | None = None
) -> T:
    """Return one section of a workdir's config.json, whatever stage made it.

    Raises:
      FileNotFoundError: it has no config.json.
      ValueError: that is not JSON, or has no such section and there is no default.
    """
    fields, file = read_config(workdir), epath.Path(workdir) / "config.json"
    if name not in fields:
        if default is not None:
            return default
        raise ValueError(f"{file} describes no {name}: it has {', '.join(fields) or 'nothing'}")
    return from_config_dict(fields[name], section_type, f"{file}: {name}")


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """Return the fields of a workdir's config.json."""
    file = absolute(workdir) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{workdir} is not a workdir: it has no config.json")
    return read_json_object(file)
