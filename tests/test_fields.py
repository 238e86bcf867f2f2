"""Every field of every config is read somewhere: a dial that turns nothing is found here.

Read from the source with ast: a field counts as read where its name is an attribute that is loaded.
"""

import ast
import pathlib

HOUSE = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ("llm", "configs", "experiments")


def unread_fields(house: pathlib.Path) -> list[str]:
    """Return "Class.field" of each field of a dataclass `…Config` that nothing reads.

    Checks in a config's own `__post_init__` are no reading: they would keep a dead field alive.
    """
    fields, read = set(), set()
    for room in ROOMS:
        for file in sorted((house / room).rglob("*.py")):
            tree = ast.parse(file.read_text())
            for config in filter(_is_config, ast.walk(tree)):
                fields |= {(config.name, name) for name in _field_names(config)}
                config.body = [node for node in config.body if not _is_post_init(node)]
            read |= _names_read(tree)
    return sorted(f"{owner}.{name}" for owner, name in fields if name not in read)


def _is_config(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return (
        isinstance(node, ast.ClassDef)
        and node.name.endswith("Config")
        and any("dataclass" in ast.unparse(decorator) for decorator in decorators)
    )


def _is_post_init(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "__post_init__"


def _field_names(config: ast.ClassDef) -> set[str]:
    annotated = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id for node in annotated if "ClassVar" not in ast.unparse(node.annotation)}


def _names_read(tree: ast.AST) -> set[str]:
    read, constants, by_variable = set(), set(), False
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                read.add(name)
            case ast.MatchClass(kwd_attrs=names):
                read.update(names)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name), *_]):
                read.add(name)
            case ast.Call(func=ast.Name(id="getattr")):
                by_variable = True
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                constants.update(e.value for e in elements if isinstance(e, ast.Constant))
    # `getattr(self, axis) for axis in MESH_AXES`: the module lists the names that it reads.
    return read | constants if by_variable else read


def test_every_field_is_read():
    assert unread_fields(HOUSE) == []


def test_a_dead_field_is_found(tmp_path):
    (tmp_path / "llm" / "data").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "llm" / "data" / "config.py").write_text(
        """
import dataclasses
from typing import ClassVar, Literal

AXES = ("data", "tensor")

@dataclasses.dataclass(frozen=True)
class DataConfig:
    length_tokens: int = 1
    only_checked: int = 2
    only_set: int = 3
    kind: Literal["a"] = "a"
    seed: int = 0
    data: int = 1
    tensor: int = 1
    NAMES: ClassVar[int] = 0

    def __post_init__(self):
        if self.only_checked < 0:
            raise ValueError("negative")

    def sizes(self):
        return [getattr(self, axis) for axis in AXES]

class NotAConfig:
    forgotten: int = 1
"""
    )
    (tmp_path / "llm" / "data" / "loader.py").write_text(
        """
def load(config):
    match config:
        case DataConfig(kind="a"):
            return getattr(config, "seed") + config.length_tokens
"""
    )
    (tmp_path / "configs" / "recipe.py").write_text("config.only_set = 4")
    assert unread_fields(tmp_path) == ["DataConfig.only_checked", "DataConfig.only_set"]
