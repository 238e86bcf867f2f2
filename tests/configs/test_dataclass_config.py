"""The dataclass-ConfigDict bridge: what recipes may do, and what a mistake is told."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.dataclass_config import (
    ConfigError,
    config_to_json,
    from_config_dict,
    to_config_dict,
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon", "lion"] = "adamw"
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be positive")


@dataclasses.dataclass(frozen=True)
class Source:
    paths: tuple[str, ...] = ()
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    total_steps: int | None = None
    optimizer: Optimizer = Optimizer()
    adapter: Optimizer | None = None
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    verbose: bool = False
    extra: Any = None
    scale: Literal["auto"] | float = "auto"

    def __post_init__(self):
        if self.total_steps is None:
            raise ValueError("total_steps is not set")


def test_defaults_become_a_locked_config_dict_and_come_back():
    config = to_config_dict(Config)
    assert config.is_locked and config.optimizer.is_locked
    assert config.optimizer.learning_rate == 1e-3
    assert config.total_steps is None
    config.total_steps = 10
    assert from_config_dict(config, Config) == Config(total_steps=10)


def test_recipe_sets_optionals_mappings_and_sections():
    config = to_config_dict(Config)
    config.total_steps = 5
    config.optimizer.clip_norm = 1
    config.adapter = to_config_dict(Optimizer(name="lion"))
    config.sources.prose = {"paths": ["a.txt", "b.txt"]}
    config.sources.code = Source(weight=0.3)
    config.scale = 2.0
    built = from_config_dict(config, Config)
    assert built == Config(
        total_steps=5,
        optimizer=Optimizer(clip_norm=1.0),
        adapter=Optimizer(name="lion"),
        sources={"code": Source(weight=0.3), "prose": Source(paths=("a.txt", "b.txt"))},
        scale=2.0,
    )
    assert type(built.optimizer.clip_norm) is float
    assert list(built.sources) == ["code", "prose"]


def test_members_of_a_mapping_can_be_changed_and_deleted_but_not_given_unknown_fields():
    config = to_config_dict(Config(total_steps=1, sources={"a": Source(), "b": Source()}))
    config.sources.a.weight = 0.5
    del config.sources["b"]
    assert from_config_dict(config, Config).sources == {"a": Source(weight=0.5)}
    with pytest.raises(AttributeError):
        config.sources.a.wieght = 0.5


def test_recipe_cannot_add_a_field_or_change_its_type():
    config = to_config_dict(Config)
    with pytest.raises(AttributeError):
        config.optimizer.learning_rat = 1.0
    with pytest.raises(TypeError):
        config.optimizer.learning_rate = "fast"
    with pytest.raises(TypeError):
        config.total_steps = "many"
    with pytest.raises(TypeError):
        config.total_steps = 1.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimiser": {}}, "config has no field 'optimiser'; did you mean optimizer?"),
        (
            {"optimizer": {"learnin_rate": 1.0}},
            "config.optimizer has no field 'learnin_rate'; did you mean learning_rate?",
        ),
        (
            {"learning_rate": 1.0},
            "config has no field 'learning_rate'; did you mean config.optimizer.learning_rate?",
        ),
        (
            {"sources": {"a": {"wieght": 1.0}}},
            "config.sources.a has no field 'wieght'; did you mean weight?",
        ),
        (
            {"optimizer": {"learning_rate": "fast"}},
            "config.optimizer.learning_rate must be float, got 'fast' (str)",
        ),
        ({"verbose": 1}, "config.verbose must be bool, got 1 (int)"),
        ({"total_steps": True}, "config.total_steps must be int or none, got True (bool)"),
        (
            {"optimizer": {"name": "adamv"}},
            'config.optimizer.name must be one of "adamw", "muon", "lion", '
            "got 'adamv' (str); did you mean adamw?",
        ),
        (
            {"optimizer": {"betas": (0.9,)}},
            "config.optimizer.betas must be (float, float), got (0.9,) (tuple)",
        ),
        (
            {"sources": {"a": {"paths": ("x", 2)}}},
            "config.sources.a.paths[1] must be str, got 2 (int)",
        ),
        ({"adapter": 3}, "config.adapter must be Optimizer or none, got 3 (int)"),
        (
            {"optimizer": {"learning_rate": -1.0}},
            "config.optimizer: learning_rate=-1.0: must be positive",
        ),
        ({}, "config: total_steps is not set"),
    ],
)
def test_a_mistake_is_told_with_key_value_and_remedy(fields, message):
    with pytest.raises(ConfigError) as caught:
        from_config_dict(fields, Config)
    assert str(caught.value) == message


def test_a_missing_required_field_is_named():
    @dataclasses.dataclass(frozen=True)
    class Needs:
        path: str

    with pytest.raises(ConfigError, match="config needs a value for path"):
        from_config_dict({}, Needs)
    with pytest.raises(ConfigError, match="config.path must be str, got None"):
        from_config_dict(to_config_dict(Needs), Needs)


def test_an_instance_with_a_wrong_value_is_refused():
    with pytest.raises(ConfigError, match="config.weight must be float, got 'heavy'"):
        to_config_dict(Source(weight="heavy"))


_FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
_SOURCES = st.builds(
    Source,
    paths=st.lists(_TEXTS, max_size=3).map(tuple),
    weight=_FLOATS,
)
_OPTIMIZERS = st.builds(
    Optimizer,
    name=st.sampled_from(["adamw", "muon", "lion"]),
    learning_rate=st.floats(min_value=2**-30, allow_infinity=False, width=32),
    clip_norm=st.none() | _FLOATS,
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


@settings(deadline=None)
@given(
    st.builds(
        Config,
        total_steps=st.integers(),
        optimizer=_OPTIMIZERS,
        adapter=st.none() | _OPTIMIZERS,
        sources=st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), _SOURCES, max_size=3),
        verbose=st.booleans(),
        scale=st.just("auto") | _FLOATS,
    )
)
def test_every_config_survives_config_dict_and_json(config):
    assert from_config_dict(to_config_dict(config), Config) == config
    assert from_config_dict(json.loads(config_to_json(config)), Config) == config
