"""The house's floors: who may import whom, read from the source with ast.

Each rule is also run on a small planted house that breaks it, to show that it can fail.
"""

import ast
import graphlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

HOUSE = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ("llm", "configs", "experiments")
FLOORS = {
    "parallel": 0,
    **dict.fromkeys(("models", "data", "objectives"), 1),
    **dict.fromkeys(("interop", "training", "generation"), 2),
    **dict.fromkeys(("rl", "evaluation", "scaling", "launch"), 3),
}
# References in parity tests and benchmarks, never part of the house.
FOREIGN = {"torch", "tensorflow", "transformers"}
# Import names of distributions that are called otherwise and may not be installed here.
DISTRIBUTIONS = {"sky": "skypilot", "lm_eval": "lm-eval"}


class Import(NamedTuple):
    """One imported name: `from a.b import c` imports "a.b.c" (c may be a module or not)."""

    source: str  # the importing module, "llm.models.layers"
    target: str
    line: int
    at_top: bool  # outside functions

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def house_modules(house: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the house's modules by dotted name; packages by their own name."""
    modules = {}
    for room in ROOMS:
        for file in sorted((house / room).rglob("*.py")):
            parts = file.relative_to(house).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imports_of(module: str, file: pathlib.Path) -> Iterator[Import]:
    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (
                    module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                )
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                yield Import(module, f"{base}.{alias.name}", node.lineno, at_top)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top and not inside)

    yield from visit(ast.parse(file.read_text()), True)


def all_imports(house: pathlib.Path) -> list[Import]:
    return [i for name, file in house_modules(house).items() for i in imports_of(name, file)]


# -------------------------------------------------------------------------------- rules


def upward_imports(house: pathlib.Path) -> list[Import]:
    """`experiments → configs → llm`, and inside llm only to lower floors or the own package."""

    def allowed(i: Import) -> bool:
        source, target = i.source.split("."), i.target.split(".")
        if target[0] not in ROOMS:
            return True
        if source[0] != target[0]:
            return ROOMS.index(target[0]) < ROOMS.index(source[0])
        if source[0] != "llm" or source[1:2] == target[1:2] or len(source) < 2:
            return True
        return FLOORS[target[1]] < FLOORS[source[1]]

    return [i for i in all_imports(house) if not allowed(i)]


def forbidden_imports(house: pathlib.Path) -> list[Import]:
    """Foreign frameworks anywhere; flags and ConfigDict in llm; optimizers in models."""

    def forbidden(i: Import) -> bool:
        root = i.target.split(".")[0]
        if root in FOREIGN:
            return True
        if i.source.startswith("llm."):
            if root == "ml_collections" or i.target.startswith(("absl.flags", "absl.app")):
                return True
        return i.source.startswith("llm.models.") and root in ("optax", "orbax")

    return [i for i in all_imports(house) if forbidden(i)]


def import_circle(house: pathlib.Path) -> list[str]:
    """Return the modules of one import circle, an empty list if there is none."""
    modules = house_modules(house)
    graph = {name: set() for name in modules}
    for i in all_imports(house):
        target = i.target
        while target and target not in modules:
            target = target.rpartition(".")[0]
        if target and target != i.source:
            graph[i.source].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def bad_packages(house: pathlib.Path) -> list[str]:
    """Return llm's folders without an `__init__.py`, or with one that is not empty."""
    folders = {file.parent for file in (house / "llm").rglob("*.py")}
    inits = [folder / "__init__.py" for folder in sorted(folders)]
    return [str(f.relative_to(house)) for f in inits if not f.exists() or f.read_text().strip()]


def undeclared_imports(house: pathlib.Path, core: set[str], extras: set[str]) -> list[Import]:
    """Imports that pyproject.toml does not declare; one of an extra must be inside a function.

    Or in a module that is itself imported inside functions alone.
    """
    owners = importlib.metadata.packages_distributions()
    imports = all_imports(house)
    early = {i.target for i in imports if i.at_top}
    early |= {target.rpartition(".")[0] for target in early}
    late = {i.target for i in imports} | {i.target.rpartition(".")[0] for i in imports}
    late = {module for module in late if module in house_modules(house)} - early

    def declared(i: Import) -> bool:
        root = i.target.split(".")[0]
        if root in ROOMS or root in sys.stdlib_module_names:
            return True
        names = {normal(n) for n in owners.get(root, [DISTRIBUTIONS.get(root, root)])}
        return bool(names & core) or (bool(names & extras) and (not i.at_top or i.source in late))

    return [i for i in imports if not declared(i)]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_distributions() -> tuple[set[str], set[str]]:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {normal(re.match(r"[\w.-]+", each)[0]) for each in requirements}

    optional = {name for key, value in extras.items() if key != "test" for name in names(value)}
    return names(project["dependencies"]), optional


# ---------------------------------------------------------------------------- the house


def test_imports_go_downward():
    assert [str(i) for i in upward_imports(HOUSE)] == []


def test_nothing_forbidden_is_imported():
    assert [str(i) for i in forbidden_imports(HOUSE)] == []


def test_no_import_circle():
    assert import_circle(HOUSE) == []


def test_packages_have_an_empty_init():
    assert bad_packages(HOUSE) == []


def test_every_import_is_declared():
    assert [str(i) for i in undeclared_imports(HOUSE, *declared_distributions())] == []


def test_every_package_of_llm_has_a_floor():
    packages = {name.split(".")[1] for name in house_modules(HOUSE) if name.startswith("llm.")}
    assert packages <= set(FLOORS)


def test_configs_import_without_jax():
    modules = [
        name
        for name, file in house_modules(HOUSE).items()
        if name.startswith("configs.") or file.name == "config.py" or "_config.py" in file.name
    ]
    assert "llm.models.config" in modules
    program = (
        f"import importlib, sys\nfor name in {modules!r}:\n  importlib.import_module(name)\n"
        "  assert 'jax' not in sys.modules, f'{name} imports jax'"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=HOUSE, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------- the planted house


@pytest.fixture
def plant(tmp_path):
    """Return a function that lays out {"llm/models/a.py": source} as a house."""

    def lay(files: dict[str, str]) -> pathlib.Path:
        for path, source in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        return tmp_path

    return lay


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("llm/models/a.py", "from llm.training.step import x"),
        ("llm/models/a.py", "def f():\n    import llm.data.rows"),
        ("llm/data/a.py", "from ..objectives import loss"),
        ("llm/scaling/a.py", "from configs import schema"),
        ("configs/a.py", "import experiments.pretrain"),
        ("llm/rl/a.py", "from llm.evaluation.tasks import x"),
    ],
)
def test_an_upward_import_is_found(plant, path, source):
    assert len(upward_imports(plant({path: source}))) == 1


def test_downward_imports_are_allowed(plant):
    sources = {
        "llm/rl/a.py": "import jax\nfrom llm.training.step import x\nfrom .b import y",
        "configs/a.py": "from configs.b import x\nfrom llm.rl.a import x",
        "experiments/a.py": "from configs import a\nfrom llm.models.a import x",
    }
    assert upward_imports(plant(sources)) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("llm/data/a.py", "def f():\n    import torch"),
        ("experiments/a.py", "from transformers import AutoModel"),
        ("llm/data/a.py", "from absl import flags"),
        ("llm/training/a.py", "import ml_collections"),
        ("llm/models/a.py", "import optax"),
    ],
)
def test_a_forbidden_import_is_found(plant, path, source):
    assert len(forbidden_imports(plant({path: source}))) == 1


def test_a_circle_is_found(plant):
    circle = {
        "llm/data/a.py": "from llm.data import b",
        "llm/data/b.py": "from llm.data.c import x",
        "llm/data/c.py": "def late():\n    from llm.data.a import y",
    }
    assert set(import_circle(plant(circle))) == {"llm.data.a", "llm.data.b", "llm.data.c"}


def test_a_package_with_code_or_without_init_is_found(plant):
    house = plant({"llm/__init__.py": "import jax", "llm/data/a.py": ""})
    assert bad_packages(house) == ["llm/__init__.py", "llm/data/__init__.py"]


def test_an_undeclared_import_is_found(plant):
    house = plant({"llm/data/a.py": "import numpy\nimport pytest\nimport wandb"})
    (found, extra) = undeclared_imports(house, {"numpy"}, {"wandb"})
    assert (found.target, extra.target) == ("pytest", "wandb")
    house = plant({"llm/data/a.py": "def f():\n    import wandb, sky"})
    assert undeclared_imports(house, set(), {"wandb", "skypilot"}) == []
    adapter = {"llm/data/a.py": "import wandb\nclass A(wandb.B): pass"}
    house = plant(adapter | {"llm/data/b.py": "def f():\n    from llm.data.a import A"})
    assert undeclared_imports(house, set(), {"wandb"}) == []
    house = plant(adapter | {"llm/data/b.py": "from llm.data.a import A"})
    assert [i.target for i in undeclared_imports(house, set(), {"wandb"})] == ["wandb"]
