"""The one bridge between the house's frozen dataclasses and ml_collections' ConfigDict.

Recipes and the command line change a ConfigDict; the library sees only checked dataclasses.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from ml_collections import ConfigDict, FieldReference

from llm.parallel.checks import shown

T = TypeVar("T")

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, its value and the remedy."""


def to_config_dict(config: Any) -> ConfigDict:
    """Return a dataclass instance, or a dataclass's defaults, as a locked, type-safe ConfigDict.

    A recipe starts from the class, `to_config_dict(PretrainConfig)`: checks across fields then wait
    until the recipe and the command line have had their say. Nested dataclasses become nested
    ConfigDicts. A `dict[str, ...]` field stays unlocked, so that a recipe may add a member (a plain
    dict or a dataclass instance) or delete one.

    Raises:
      ConfigError: a value does not fit its field.
    """
    config_type = config if isinstance(config, type) else type(config)
    values = _defaults(config) if isinstance(config, type) else _values(config)
    section = _encode_section(values, config_type, "config")
    section.lock()
    _unlock_mappings(section, config_type)
    return section


def from_config_dict(config: Mapping[str, Any], config_type: type[T], path: str = "config") -> T:
    """Return the dataclass that a ConfigDict (or the dict of a config.json) describes.

    Missing keys take the dataclass's defaults; lists serve as tuples and ints as floats.

    Raises:
      ConfigError: an unknown key, a value of another type or outside a Literal's choices, or a
        ValueError from the dataclass's own `__post_init__`. The first one found is told.
    """
    return decode(config, config_type, path)


def config_to_json(config: Any) -> str:
    """Return a dataclass instance as indented JSON, the text of a workdir's config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


# ------------------------------------------------------------------- types of fields


@functools.cache
def field_types(config_type: type) -> dict[str, Any]:
    """Return a dataclass's field names with their annotations resolved."""
    hints = typing.get_type_hints(config_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def strip_optional(annotation: Any) -> Any:
    """Return `X` for `X | None`; another annotation as it is."""
    members = [member for member in union_members(annotation) if member is not types.NoneType]
    return members[0] if len(members) == 1 else annotation


def mapping_member_type(annotation: Any) -> Any | None:
    """Return `X` for `dict[str, X]`, None for anything else."""
    if typing.get_origin(annotation) in (dict, Mapping):
        return typing.get_args(annotation)[1]
    return None


def describe_type(annotation: Any) -> str:
    """Return how a message calls a type: `float or none`, `one of "a", "b"`, `tuple of str`."""
    members = union_members(annotation)
    if len(members) > 1:
        return " or ".join(describe_type(member) for member in members)
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return "one of " + ", ".join(json.dumps(choice) for choice in arguments)
        case origin if origin is tuple:
            if arguments[-1:] == (Ellipsis,):
                return f"tuple of {describe_type(arguments[0])}"
            return "(" + ", ".join(map(describe_type, arguments)) + ")"
    if mapping_member_type(annotation) is not None:
        return f"dict of {describe_type(arguments[1])}"
    if annotation is types.NoneType:
        return "none"
    return getattr(annotation, "__name__", str(annotation))


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest choice, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def unknown_field(path: str, name: str, config_type: type) -> ConfigError:
    """Return the error for a key that a section does not have, naming the nearest valid one."""
    names = list(field_types(config_type))
    hint = did_you_mean(name, names)
    if not hint:
        # Right name in the wrong place: config.learning_rate for config.optimizer.learning_rate.
        below = [key for key in paths_below(config_type) if key.rsplit(".", 1)[-1] == name]
        hint = f"; did you mean {path}.{below[0]}?" if below else f"; it has {', '.join(names)}"
    return ConfigError(f"{path} has no field {name!r}{hint}")


def paths_below(config_type: type) -> Iterable[str]:
    """Yield the dotted names of a dataclass's fields and sections, and of those in sections."""
    for name, annotation in field_types(config_type).items():
        yield name
        for member in union_members(annotation):
            if dataclasses.is_dataclass(member):
                yield from (f"{name}.{rest}" for rest in paths_below(member))


# ------------------------------------------------------------- dataclass to ConfigDict


def _values(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in field_types(type(config))}


def _defaults(config_type: type) -> dict[str, Any]:
    """Return each field's default; None, to be filled in, where a field has none."""
    defaults = {}
    for field in dataclasses.fields(config_type):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        else:
            defaults[field.name] = None if field.default is dataclasses.MISSING else field.default
    return defaults


def _encode_section(values: dict[str, Any], config_type: type, path: str) -> ConfigDict:
    section = ConfigDict()
    for name, annotation in field_types(config_type).items():
        value = values[name]
        encoded = None if value is None else _encode(value, annotation, f"{path}.{name}")
        section[name] = _typed(encoded, annotation)
    return section


def _encode(value: Any, annotation: Any, path: str) -> Any:
    """Return a checked value in the form that a ConfigDict holds."""
    value = decode(value, annotation, path)
    if dataclasses.is_dataclass(value):
        return _encode_section(_values(value), type(value), path)
    if isinstance(value, Mapping):
        member_type = mapping_member_type(strip_optional(annotation))
        return ConfigDict(
            {name: _encode(member, member_type, f"{path}.{name}") for name, member in value.items()}
        )
    if isinstance(value, tuple):
        # A tuple is held as it is; only dataclasses in it change their form.
        return tuple(_encode(v, type(v), path) if dataclasses.is_dataclass(v) else v for v in value)
    return value


def _typed(encoded: Any, annotation: Any) -> Any:
    """Return the value, or a reference that remembers the type where the value alone would not."""
    classes = _held_classes(annotation)
    if encoded is not None and len(classes) == 1:
        return encoded
    classes = tuple(kind for kind in classes if kind is not types.NoneType)
    return FieldReference(encoded, classes[0] if len(classes) == 1 else classes)


def _held_classes(annotation: Any) -> set[Any]:
    """Return the classes that a ConfigDict holds for an annotation."""
    classes = set()
    for member in union_members(annotation):
        origin = typing.get_origin(member)
        if member is Any:
            classes.update((object, types.NoneType))
        elif origin is Literal:
            classes.update(type(choice) for choice in typing.get_args(member))
        elif dataclasses.is_dataclass(member) or mapping_member_type(member) is not None:
            classes.add(ConfigDict)
        else:
            classes.add(origin or member)
    return classes


def _unlock_mappings(section: ConfigDict, config_type: type) -> None:
    """Unlock the `dict[str, ...]` fields below a locked section, and lock their members again."""
    for name, annotation in field_types(config_type).items():
        value, annotation = section[name], strip_optional(annotation)
        member_type = mapping_member_type(annotation)
        if not isinstance(value, ConfigDict):
            continue
        if member_type is None:
            _unlock_mappings(value, annotation)
            continue
        value.unlock()
        for member in value.values():
            if dataclasses.is_dataclass(member_type):
                member.lock()
                _unlock_mappings(member, member_type)


# ------------------------------------------------------------- ConfigDict to dataclass


def decode(value: Any, annotation: Any, path: str) -> Any:
    """Return `value` as `annotation` wants it: checked, with dicts made into dataclasses.

    Raises:
      ConfigError: the value does not fit; `path` is how the message calls it.
    """
    members = union_members(annotation)
    if len(members) > 1:
        return _decode_union(value, annotation, path)
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(value, annotation, path)
    member_type = mapping_member_type(annotation)
    if member_type is not None and isinstance(value, Mapping | ConfigDict):
        # Sorted, as a ConfigDict sorts too: the order of a mapping never depends on its spelling.
        _check_keys(value, path)
        return {
            name: decode(value[name], member_type, f"{path}.{name}")
            for name in sorted(value.keys())
        }
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            hint = did_you_mean(str(value), map(str, arguments))
            raise _wrong_value(path, annotation, value, hint)
        return value
    if origin is tuple and isinstance(value, tuple | list):
        return _decode_tuple(value, annotation, path)
    if annotation is float and type(value) in (int, float):
        return _decode_float(value, path)
    if annotation is str and isinstance(value, str):
        _check_text(value, path)
    if type(value) is not (origin or annotation):  # `is`: a bool is no int here
        raise _wrong_value(path, annotation, value)
    return value


def _decode_union(value: Any, annotation: Any, path: str) -> Any:
    members = union_members(annotation)
    if value is None and types.NoneType in members:
        return None
    concrete = [member for member in members if member is not types.NoneType]
    if len(concrete) == 1 and isinstance(value, Mapping | ConfigDict):
        return decode(value, concrete[0], path)  # its own message is the better one
    # An exact type wins, so that `int | float` keeps the int it was given.
    for member in sorted(concrete, key=lambda member: type(value) is not member):
        try:
            return decode(value, member, path)
        except ConfigError:
            continue
    raise _wrong_value(path, annotation, value)


def _decode_float(value: float, path: str) -> float:
    # What float32 cannot hold is an infinity on the devices.
    if not abs(value) <= _FLOAT32_MAX:
        raise ConfigError(f"{path}={shown(value)}: must be finite, and at most {_FLOAT32_MAX:.3g}")
    return float(value)


def _check_text(text: str, path: str) -> None:
    """Raise where a text could be neither a path nor part of a config.json.

    Bytes on the command line that are no UTF-8 come as halves of surrogate pairs.
    """
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{path}={shown(text)}: must be Unicode text without zero bytes")


def _check_keys(value: Mapping | ConfigDict, path: str) -> None:
    for key in value.keys():
        if not isinstance(key, str) or "." in key:
            raise ConfigError(f"{path} has the key {shown(key)}: keys are str without dots")
        _check_text(key, f"{path}: the key")


def _decode_tuple(value: tuple | list, annotation: Any, path: str) -> tuple:
    arguments = typing.get_args(annotation)
    if arguments[-1:] == (Ellipsis,):
        arguments = arguments[:1] * len(value)
    elif len(arguments) != len(value):
        raise _wrong_value(path, annotation, value)
    return tuple(
        decode(element, argument, f"{path}[{i}]")
        for i, (element, argument) in enumerate(zip(value, arguments, strict=True))
    )


def _decode_dataclass(value: Any, config_type: type[T], path: str) -> T:
    if isinstance(value, config_type):
        value = _values(value)
    if not isinstance(value, Mapping | ConfigDict):
        raise _wrong_value(path, config_type, value)
    known = field_types(config_type)
    _check_keys(value, path)
    arguments = {}
    for name in value.keys():
        if name not in known:
            raise unknown_field(path, name, config_type)
        arguments[name] = decode(value[name], known[name], f"{path}.{name}")
    try:
        return config_type(**arguments)
    except ValueError as error:  # from its __post_init__
        raise ConfigError(f"{path}: {error}") from error
    except TypeError as error:
        missing = [
            field.name
            for field in dataclasses.fields(config_type)
            if field.name not in arguments
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if not missing:
            raise
        raise ConfigError(f"{path} needs a value for {', '.join(missing)}") from error


def _wrong_value(path: str, annotation: Any, value: Any, hint: str = "") -> ConfigError:
    got = f"{shown(value)} ({type(value).__name__})"
    return ConfigError(f"{path} must be {describe_type(annotation)}, got {got}{hint}")
