"""From `--config=recipe.py:argument --config.a.b=value` to a checked dataclass, without JAX.

Overrides are read by the type of the dataclass field (not of the current value, as ml_collections'
own flags do), so that `none`, Literal choices, and whole sections work and errors name the field.
"""

import ast
import dataclasses
import importlib.util
import inspect
import re
import traceback
import types
import typing
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from configs.dataclass_config import (
    ConfigError,
    decode,
    describe_type,
    did_you_mean,
    field_types,
    from_config_dict,
    mapping_member_type,
    strip_optional,
    to_config_dict,
    union_members,
    unknown_field,
)

_MOST_DIGITS = 30  # of a whole number: 1e999999999 is quickly typed and never made
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)


class Override(NamedTuple):
    """One `--config.path=text` of the command line; text is None where no value was given."""

    path: str
    text: str | None


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Return the arguments that are no overrides, and the overrides, both in order.

    `--config.a=1`, `--config.a 1`, `--config.flag` and `--noconfig.flag` are all read.
    """
    others, overrides = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        match = _OVERRIDE.fullmatch(argument)
        if argument == "--":
            return others + [argument] + remaining, overrides
        if match is None:
            others.append(argument)
            continue
        negated, path, text = match.groups()
        if negated:
            text = "false"
        elif text is None and remaining and not remaining[0].startswith("--"):
            text = remaining.pop(0)
        overrides.append(Override(path, text))
    return others, overrides


def as_override(path: str, value: Any) -> Override:
    """Return what sets a field to a Python value: the text that is typed for it."""
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, str):
        return Override(path, value)
    return Override(path, "none" if value is None else repr(value))


def load_config(
    recipe: str, overrides: Sequence[Override], config_type: type | tuple[type, ...]
) -> Any:
    """Return the dataclass that a recipe (`path.py` or `path.py:argument`) and overrides describe.

    Of several types it is the one whose fields the recipe has.

    Raises:
      FileNotFoundError: no such recipe.
      ConfigError: the recipe or an override does not fit `config_type`.
    """
    config = load_recipe(recipe)
    if isinstance(config_type, tuple):
        config_type = _type_of(config, config_type, recipe)
    for override in overrides:
        apply_override(config, override, config_type)
    return from_config_dict(config, config_type)


# ------------------------------------------------------------------------------ recipes


def load_recipe(recipe: str) -> ConfigDict:
    """Run a recipe file's `get_config` and return its ConfigDict.

    Raises:
      FileNotFoundError: no such file, from here or from the house's own folder.
      ConfigError: the file has no `get_config`, or `get_config` sets what does not exist.
    """
    path, _, argument = recipe.partition(":")
    file = _find_recipe(path)
    spec = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"recipe {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"recipe {path}:{error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"recipe {path} has no function get_config(arg=None)")
    if argument and not inspect.signature(module.get_config).parameters:
        raise ConfigError(f"recipe {path} takes no argument, got {argument!r}")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        line = _line_to_blame(error, file)
        if line is None:
            raise
        raise ConfigError(f"recipe {path}:{line}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"recipe {path}: get_config returned {config!r}, not a ConfigDict")
    return config


def _type_of(config: ConfigDict, types: tuple[type, ...], recipe: str) -> type:
    for each in types:
        if set(field_types(each)) == set(config):
            return each
    names = ", ".join(each.__name__ for each in types)
    raise ConfigError(f"recipe {recipe} is none of the kinds that this experiment takes: {names}")


def _find_recipe(path: str) -> Path:
    house = Path(__file__).resolve().parent.parent
    for file in (Path(path).expanduser(), house / path):  # shells leave `--config=~/x.py` as it is
        if file.is_file():
            return file
    known = [f"configs/{file.name}" for file in sorted((house / "configs").glob("*.py"))]
    raise FileNotFoundError(f"no recipe {path!r}{did_you_mean(path, known)}")


def _line_to_blame(error: Exception, file: Path) -> int | None:
    """Return the recipe's line that an error is about, None where it looks like a plain bug.

    A message is what ml_collections raises about a key or type, or a ValueError of anyone's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    from_config_dict = "ml_collections" in Path(frames[-1].filename).parts
    if isinstance(error, ValueError) or from_config_dict:
        return lines[-1] if lines else None
    return None


def _one_line(error: Exception) -> str:
    """Return an error's text; ml_collections' own, which prints the whole config, made short."""
    text = str(error.args[0]) if error.args else str(error)
    if isinstance(error, KeyError | AttributeError):
        text = text.replace("\\'", "'").strip("'\"")  # these quote their argument
    missing = re.search(r'Key "?\'?(\w+)"? does not exist', text) or re.match(r"'?(\w+)'?\b", text)
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
    if near:
        return f"no field {near[2]!r}; did you mean {near[1]}?"
    if missing and isinstance(error, KeyError | AttributeError):
        return f"no field {missing[1]!r}"
    return " ".join(text.split())


# ---------------------------------------------------------------------------- overrides


def apply_override(config: ConfigDict, override: Override, config_type: type) -> None:
    """Set one field of a recipe's ConfigDict from the text of a command line.

    Naming a member of a `dict[str, ...]` field that does not exist yet is an error (a misspelling
    would add it silently); giving the member whole, as a Python dict, adds it.

    Raises:
      ConfigError: no such field, or the text does not fit the field's type.
    """
    *parents, last = override.path.split(".")
    section, annotation, path = config, config_type, "config"
    for name in parents:
        section, annotation = _enter(section, annotation, name, path)
        path = f"{path}.{name}"
    member_type = mapping_member_type(annotation)
    if member_type is not None:
        field_type = member_type
        if last not in section and not dataclasses.is_dataclass(member_type):
            raise _unknown_member(path, last, section, member_type)
        if override.text is not None and override.text.lower() == "none" and last in section:
            del section[last]
            return
        if last not in section and not (override.text or "").lstrip().startswith("{"):
            raise _unknown_member(path, last, section, member_type)
    elif last in field_types(annotation):
        field_type = field_types(annotation)[last]
    else:
        raise unknown_field(path, last, annotation)
    path = f"{path}.{last}"
    value = decode(_parse(override.text, field_type, path), field_type, path)
    section[last] = _as_held(value)


def _enter(section: ConfigDict, annotation: Any, name: str, path: str) -> tuple[ConfigDict, Any]:
    """Return the section called `name` of a section, and the dataclass or mapping it stands for."""
    member_type = mapping_member_type(annotation)
    if member_type is not None:
        if name not in section:
            raise _unknown_member(path, name, section, member_type)
        inner = member_type
    elif name in field_types(annotation):
        inner = field_types(annotation)[name]
    else:
        raise unknown_field(path, name, annotation)
    inner = strip_optional(inner)
    is_section = dataclasses.is_dataclass(inner) or mapping_member_type(inner) is not None
    if not is_section:
        raise ConfigError(f"{path}.{name} is {describe_type(inner)}: it has no fields of its own")
    if section[name] is None:
        section[name] = to_config_dict(inner)  # an absent optional section starts at its defaults
    elif not isinstance(section[name], ConfigDict):
        section[name] = _as_held(section[name])  # a recipe gave the member as a dataclass
    return section[name], inner


def _unknown_member(path: str, name: str, section: ConfigDict, member_type: Any) -> ConfigError:
    hint = did_you_mean(name, section.keys())
    if dataclasses.is_dataclass(member_type):
        how = f"--{path}.{name}=\"{{'{next(iter(field_types(member_type)))}': ...}}\""
    else:
        how = f'--{path}="{{...}}" with all members'
    return ConfigError(f"{path} has no member {name!r}{hint} (to add one: {how})")


def _as_held(value: Any) -> Any:
    """Return a decoded value in the form that a ConfigDict holds."""
    if dataclasses.is_dataclass(value):
        return to_config_dict(value)
    if isinstance(value, dict):
        return ConfigDict({name: _as_held(member) for name, member in value.items()})
    return value


# --------------------------------------------------------------------- values from text


def _parse(text: str | None, annotation: Any, path: str) -> Any:
    """Return the value that a text spells for a type; the text itself where it spells none."""
    members = union_members(annotation)
    if text is None:
        if bool not in members:
            raise ConfigError(f"--{path} needs a value: {describe_type(annotation)}")
        return True
    if types.NoneType in members and text.lower() in ("none", "null"):
        return None
    for member in members:
        value = _parse_as(text, member, path)
        if value is not None:
            return value
    return text


def _parse_as(text: str, annotation: Any, path: str) -> Any | None:
    """Return the value that a text spells for one plain type, None where it spells none."""
    origin = typing.get_origin(annotation)
    if annotation is str:
        return text
    if annotation is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    if annotation is int:
        return _parse_int(text)
    if annotation is float:
        try:
            return float(text)
        except ValueError:
            return None
    if origin is Literal:
        return next((c for c in typing.get_args(annotation) if str(c) == text), None)
    if origin is tuple:
        return _parse_tuple(text, annotation, path)
    return _parse_literal(text)  # a section or mapping as a dict; Any


def _parse_int(text: str) -> int | None:
    """Return the int of `12`, `1_000` or `3e9`."""
    try:
        number = Decimal(text)
        if ("." in text and "e" not in text.lower()) or number.adjusted() > _MOST_DIGITS:
            return None
        return int(number) if number == number.to_integral_value() else None
    except (InvalidOperation, OverflowError, ValueError):
        return None


def _parse_literal(text: str) -> Any | None:
    """Return the value of a Python literal, None where it is none or too deep to be one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _parse_tuple(text: str, annotation: Any, path: str) -> tuple | None:
    """Return the tuple of `a,b`, `(1, 2)` or `["a", "b"]`; of nothing for an empty text."""
    if text.strip().startswith(("(", "[")):
        value = _parse_literal(text)
        return tuple(value) if isinstance(value, tuple | list) else None
    arguments = typing.get_args(annotation)
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if arguments[-1:] == (Ellipsis,):
        arguments = arguments[:1] * len(parts)
    if len(arguments) != len(parts):
        return None
    return tuple(_parse(part, arg, path) for part, arg in zip(parts, arguments, strict=True))
