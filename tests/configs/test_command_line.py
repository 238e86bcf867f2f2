"""Recipes and `--config.…` overrides: every spelling of a value, one clear message a mistake."""

import dataclasses
from typing import Literal

import pytest

from configs.command_line import Override, apply_override, load_config, load_recipe, split_overrides
from configs.dataclass_config import ConfigError, from_config_dict, to_config_dict


@dataclasses.dataclass(frozen=True)
class Source:
    kind: str = "files"
    paths: tuple[str, ...] = ()
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    clip_norm: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Config:
    total_steps: int = 10
    optimizer: Optimizer = Optimizer()
    adapter: Optimizer | None = None
    sources: dict[str, Source] = dataclasses.field(
        default_factory=lambda: {"prose": Source(), "code": Source()}
    )
    limits: dict[str, int] = dataclasses.field(default_factory=lambda: {"rows": 1})
    verbose: bool = False
    title: str = ""


def override(*arguments: str) -> Config:
    others, overrides = split_overrides(arguments)
    assert others == []
    config = to_config_dict(Config)
    for each in overrides:
        apply_override(config, each, Config)
    return from_config_dict(config, Config)


def test_overrides_are_split_from_other_flags():
    others, overrides = split_overrides(
        ["--workdir=w", "--config=c.py", "--config.a.b=1=2", "--config.x", "-3", "--config.flag"]
        + ["--noconfig.other", "-config.y=z", "--configuration.x=1", "--", "--config.late=1"]
    )
    assert others == [
        "--workdir=w",
        "--config=c.py",
        "--configuration.x=1",
        "--",
        "--config.late=1",
    ]
    assert overrides == [
        Override("a.b", "1=2"),
        Override("x", "-3"),
        Override("flag", None),
        Override("other", "false"),
        Override("y", "z"),
    ]


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--config.optimizer.learning_rate=3e-4"], "optimizer.learning_rate", 3e-4),
        (["--config.optimizer.learning_rate", "2"], "optimizer.learning_rate", 2.0),
        (["--config.optimizer.clip_norm=none"], "optimizer.clip_norm", None),
        (["--config.optimizer.name=muon"], "optimizer.name", "muon"),
        (["--config.optimizer.betas=0.8,0.9"], "optimizer.betas", (0.8, 0.9)),
        (["--config.optimizer.betas=(0.5, 1)"], "optimizer.betas", (0.5, 1.0)),
        (["--config.total_steps=1_000"], "total_steps", 1000),
        (["--config.total_steps=3e9"], "total_steps", 3_000_000_000),
        (["--config.total_steps=-1"], "total_steps", -1),
        (["--config.total_steps=1", "--config.total_steps=2"], "total_steps", 2),
        (["--config.verbose"], "verbose", True),
        (["--config.verbose=true"], "verbose", True),
        (["--config.verbose", "--noconfig.verbose"], "verbose", False),
        (["--config.title=none, (really)"], "title", "none, (really)"),
        (["--config.title="], "title", ""),
        (["--config.adapter.name=muon"], "adapter", Optimizer(name="muon")),
        (["--config.adapter={}", "--config.adapter=none"], "adapter", None),
        (["--config.optimizer={'name': 'muon'}"], "optimizer", Optimizer(name="muon")),
        (["--config.limits.rows=5"], "limits", {"rows": 5}),
        (["--config.limits={'files': 2}"], "limits", {"files": 2}),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(arguments, path, value):
    read = override(*arguments)
    for name in path.split("."):
        read = getattr(read, name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("data/*.jsonl", ("data/*.jsonl",)),
        ("a.txt,b.txt", ("a.txt", "b.txt")),
        ("('a,b.txt', 'c')", ("a,b.txt", "c")),
        ('["a"]', ("a",)),
        ("", ()),
    ],
)
def test_tuples_of_paths(text, paths):
    assert override(f"--config.sources.code.paths={text}").sources["code"].paths == paths


def test_members_of_a_mapping_are_changed_added_and_removed():
    sources = override(
        "--config.sources.code.weight=0.3",
        "--config.sources.film={'kind': 'tfds'}",
        "--config.sources.film.weight=2",
        "--config.sources.prose=none",
    ).sources
    assert sources == {"code": Source(weight=0.3), "film": Source(kind="tfds", weight=2.0)}
    assert override("--config.sources={'only': {}}").sources == {"only": Source()}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.optimizer.learnin_rate=1",
            "config.optimizer has no field 'learnin_rate'; did you mean learning_rate?",
        ),
        ("--config.optimzer.name=muon", "config has no field 'optimzer'; did you mean optimizer?"),
        (
            "--config.learning_rate=1",
            "config has no field 'learning_rate'; did you mean config.optimizer.learning_rate?",
        ),
        (
            "--config.zzz=1",
            "config has no field 'zzz'; it has total_steps, optimizer, adapter, sources, limits, "
            "verbose, title",
        ),
        (
            "--config.optimizer.learning_rate=fast",
            "config.optimizer.learning_rate must be float, got 'fast' (str)",
        ),
        ("--config.total_steps=2.5", "config.total_steps must be int, got '2.5' (str)"),
        ("--config.total_steps=none", "config.total_steps must be int, got 'none' (str)"),
        ("--config.verbose=maybe", "config.verbose must be bool, got 'maybe' (str)"),
        ("--config.total_steps", "--config.total_steps needs a value: int"),
        (
            "--config.optimizer.name=moun",
            'config.optimizer.name must be one of "adamw", "muon", got \'moun\' (str); '
            "did you mean muon?",
        ),
        (
            "--config.optimizer.betas=0.9",
            "config.optimizer.betas must be (float, float), got '0.9' (str)",
        ),
        (
            "--config.sources.cod.weight=0.3",
            "config.sources has no member 'cod'; did you mean code? "
            "(to add one: --config.sources.cod=\"{'kind': ...}\")",
        ),
        (
            "--config.sources.film={'knd': 'tfds'}",
            "config.sources.film has no field 'knd'; did you mean kind?",
        ),
        (
            "--config.limits.row=3",
            "config.limits has no member 'row'; did you mean rows? "
            '(to add one: --config.limits="{...}" with all members)',
        ),
        ("--config.title.x=1", "config.title is str: it has no fields of its own"),
        ("--config.optimizer=muon", "config.optimizer must be Optimizer, got 'muon' (str)"),
    ],
)
def test_a_mistake_is_one_clear_line(argument, message):
    with pytest.raises(ConfigError) as caught:
        override(argument)
    assert str(caught.value) == message


# ------------------------------------------------------------------------------ recipes

RECIPE = """
from configs.dataclass_config import to_config_dict
from llm.parallel.config import MeshConfig

def get_config(arg=None):
    config = to_config_dict(MeshConfig)
    {body}
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    def write(body: str) -> str:
        file = tmp_path / "my_recipe.py"
        file.write_text(RECIPE.format(body=body))
        return str(file)

    return write


def test_recipe_with_argument_and_override(recipe):
    from llm.parallel.config import MeshConfig

    path = recipe("config.fsdp = int(arg or 1)")
    assert load_config(path, [], MeshConfig) == MeshConfig()
    assert load_config(f"{path}:4", [Override("tensor", "2")], MeshConfig) == MeshConfig(
        fsdp=4, tensor=2
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.tensr = 2", ":7: no field 'tensr'; did you mean tensor?"),
        ("config.qqq = 2", ":7: no field 'qqq'"),
        ("print(config.tensr)", ":7: no field 'tensr'; did you mean tensor?"),
        ("config.tensor = 'two'", ":7: Could not override field 'tensor'"),
        ("raise ValueError('depth must be positive')", ":7: depth must be positive"),
        ("config = 3", ": get_config returned 3, not a ConfigDict"),
        ("config = = 3", ":7: invalid syntax"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_line(recipe, body, message):
    path = recipe(body)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}{message}")
    assert "\n" not in str(caught.value)


def test_a_bug_in_a_recipe_is_no_config_error(recipe):
    with pytest.raises(TypeError, match="unsupported operand"):
        load_recipe(recipe("config.tensor = None + 1"))


def test_a_recipe_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe 'configs/scema.py'; did you mean"):
        load_recipe("configs/scema.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="has no function get_config"):
        load_recipe(str(tmp_path / "empty.py"))


def test_a_recipe_without_arguments_refuses_one(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError, match="takes no argument, got 'large'"):
        load_recipe(f"{tmp_path}/plain.py:large")
