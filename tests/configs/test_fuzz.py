"""Bad values for every field of every config: accepted, or one line of the house's that names it.

Fields are found by walking the stages of configs/schema.py. To search longer, with other seeds:
`HYPOTHESIS_PROFILE=long pytest tests/configs/test_fuzz.py` (tests/conftest.py has the profiles).
"""

import copy
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import schema
from configs.command_line import Override, apply_override, load_recipe
from configs.dataclass_config import (
    ConfigError,
    config_to_json,
    field_types,
    from_config_dict,
    mapping_member_type,
    strip_optional,
)
from experiments.entry import _is_users_mistake

HOUSE = pathlib.Path(__file__).resolve().parents[2]
RECIPES = [
    "pretrain_tiny", "finetune_tiny", "reward_tiny", "preference_tiny", "rlhf_tiny", "scaling",
    "emergence", "speedrun", "sweep_tiny", "sweep_tpu",
]  # fmt: skip


class Field(NamedTuple):
    """One field of a config: how the command line calls it in a recipe that has it."""

    recipe: str
    stage: type
    path: str

    def set(self, text: str) -> Any:
        """Return the config with the field as a user would set it."""
        config = copy.deepcopy(_LOADED[self.recipe])
        apply_override(config, Override(self.path, text), self.stage)
        return from_config_dict(config, self.stage)


def _stage_of(recipe: str) -> type:
    stages = [
        stage
        for stage in vars(schema).values()
        if dataclasses.is_dataclass(stage) and stage.__module__ == "configs.schema"
    ]
    for stage in stages:
        try:
            from_config_dict(_LOADED[recipe], stage)
            return stage
        except ConfigError:
            continue
    raise AssertionError(f"{recipe} is a recipe of no stage")


def _walk(config: Any, annotation: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (what the field is, its path) of everything below a section of a recipe."""
    annotation = strip_optional(annotation)
    if dataclasses.is_dataclass(annotation):
        for name, inner in field_types(annotation).items():
            yield f"{annotation.__name__}.{name}", f"{path}{name}"
            if config is not None:
                yield from _walk(config[name], inner, f"{path}{name}.")
    elif mapping_member_type(annotation) is not None and config:
        name = next(iter(config))
        yield f"{annotation}", f"{path}{name}"
        yield from _walk(config[name], mapping_member_type(annotation), f"{path}{name}.")


def _fields() -> dict[str, Field]:
    """Return each field once, whichever stages have it."""
    found: dict[str, Field] = {}
    for recipe, config in _LOADED.items():
        stage = _stage_of(recipe)
        for what, path in _walk(config, stage, ""):
            found.setdefault(what, Field(recipe, stage, path))
    return found


_LOADED = {recipe: load_recipe(str(HOUSE / f"configs/{recipe}.py")) for recipe in RECIPES}
FIELDS = _fields()
NEVER_GOOD = ["x y\nz", "nan", "-1.5", str(10**30), "{1: 2}", r"('a\0',)"]
TEXTS = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1", "2.5", "-inf", "inf", "1e300", "1e-300", "9" * 5000, "1e999999999"]
        + ["none", "true", "é☃", "\udcff", "a\0b", "(", "()", "(None,)", "[" * 5000]
        + ["-" * 20000 + "1", "(" + "1," * 9999 + ")", "{}", "{'a': 1}", "{[]: 1}", "{'a.b': {}}"]
        + ["{'': {}}", "{'../x': {}}", "{'keys': {}}", "{'x': None}", "../x", str(2**31)]
    ),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda each: (
            st.lists(each, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=3) | st.integers(), each, max_size=2)
        ),
    ).map(repr),
)


def check(field: Field, text: str) -> None:
    """Set the field: the config must be one that a workdir can keep, or the error must name it."""
    try:
        config = field.set(text)
    except Exception as error:
        message = str(error)
        assert _is_users_mistake(error), f"--config.{field.path}={text[:80]!r} raised {error!r}"
        *parents, name = field.path.split(".")
        # Of a check across fields the message begins with the section that has them all; a mapping
        # whose last member goes is what is called empty.
        named = any(re.search(rf"\b{re.escape(part)}\b", message) for part in (name, *parents[-1:]))
        assert named, f"--config.{field.path}: {message}"
        assert len(message) < 700 and "\n" not in message, message
    else:
        stored = json.loads(config_to_json(config).encode())
        json.dumps(stored, allow_nan=False)
        assert from_config_dict(stored, field.stage) == config


def test_every_config_of_every_stage_is_walked():
    walked = {what.split(".")[0] for what in FIELDS}
    sections = {
        each.__name__
        for each in vars(schema).values()
        if dataclasses.is_dataclass(each) and each.__name__.endswith("Config")
    }
    bases = {"TrainingConfig", "ComparisonStageConfig"}  # whose fields their stages have
    assert sections - bases <= walked
    assert len(FIELDS) > 300


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_field_is_checked(recipe):
    for field in FIELDS.values():
        if field.recipe == recipe:
            for text in NEVER_GOOD:
                check(field, text)


@given(st.sampled_from(sorted(FIELDS)), TEXTS)
def test_any_text_for_any_field(what, text):
    check(FIELDS[what], text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300"])
def test_no_number_is_without_a_check(text):
    """What no field can mean: were it accepted, a run would end in it."""
    for what, field in FIELDS.items():
        try:
            config = field.set(text)
        except ConfigError:
            continue
        value = config
        for name in field.path.split("."):
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        assert isinstance(value, str | tuple), f"{what} accepts {text}"
