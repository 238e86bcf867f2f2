"""Tokenizers from files, which may come from anywhere: a tokenizer.json and the settings beside it.
Read as JSON, never unpickled; what cannot be used is one error that names the file."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tokenizers
from etils import epath

from llm.data.disk import read_json_object
from llm.data.tokenizers import TOKEN_FIELDS, Tokenizer, TokenizerError


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Return the tokenizer of a directory (a workdir's, Hugging Face's) or a tokenizer.json.

    Settings and chat template are taken from the files beside tokenizer.json, if there.

    Raises:
      TokenizerError: no such file, or it is not a tokenizer's.
    """
    file = epath.Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.exists():
        raise TokenizerError(f"no tokenizer at {path}: there is no {file}")
    with _damage_named(file):
        backend = tokenizers.Tokenizer.from_str(file.read_bytes().decode("utf-8-sig"))
    settings = _load_settings(file.parent)
    with _damage_named(file):
        tokenizer = Tokenizer.make(backend, settings)
        _ = tokenizer.eos_id  # documents need an end: fail here, not in training
        tokenizer.decode(tokenizer.encode("a b"))
    return tokenizer


@contextlib.contextmanager
def _damage_named(file: epath.Path) -> Iterator[None]:
    """Turn what the library raises on a definition that it cannot use into one clear error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from error
    except BaseException as error:  # it raises Exception itself, and its panics are not even that
        text = " ".join(str(error).split())[:300]
        raise TokenizerError(f"{file} is not a Hugging Face tokenizer.json: {text}") from error


def _load_settings(folder: epath.Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings.update(read_json_object(folder / name))
    for name in TOKEN_FIELDS:
        token = settings.get(name)
        spelled = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(spelled, str):
            raise TokenizerError(f"{folder}: the tokenizer's {name} is {spelled!r:.80}, not a text")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name, of which the default serves for chat
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if (folder / "chat_template.jinja").exists():  # goes before the setting, as in transformers
        template = read_template(folder / "chat_template.jinja")
    if template is not None:
        if not isinstance(template, str):
            raise TokenizerError(f"{folder}: the tokenizer's chat_template is not a text")
        settings["chat_template"] = template
    return settings


def read_template(file: epath.PathLike) -> str:
    """Return the Jinja source in a file.

    Raises:
      FileNotFoundError: there is no such file.
      TokenizerError: it is not UTF-8.
    """
    try:
        return epath.Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8: {error}") from error
