"""Nothing that is loaded is unpickled, evaluated or unpacked outside of its place: read from the
source with ast, as the house's floors are. Each rule is also run on lines that break it."""

import ast
import pathlib

import pytest

HOUSE = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ("llm", "configs", "experiments")
# They run code that a file names.
PICKLES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml",
    "torch",
}  # fmt: skip
EVALUATIONS = {"eval", "exec", "compile", "__import__"}
# Of NumPy, pandas, tarfile, zipfile and shutil.
READERS = {"load", "fromfile", "read_pickle", "read_array", "extractall", "unpack_archive"}


def dangers(source: str) -> list[str]:
    """Return what in a module's source could run code, or write files, that others have chosen."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module)):
                modules = [module]
            case _:
                modules = []
        found += [f"imports {m}" for m in modules if m.split(".")[0] in PICKLES]
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in EVALUATIONS:
                found.append(f"calls {name}")
            case ast.Call(func=ast.Attribute(attr=name)) if name in READERS:
                if not _is_safe(node):
                    found.append(f"calls {ast.unparse(node.func)}")
    return found


def _is_safe(call: ast.Call) -> bool:
    """Return whether pickles, or paths that lead out of a folder, are refused by an argument."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return given.get("allow_pickle") == "False" or given.get("filter") == "'data'"


def modules() -> list[pathlib.Path]:
    return [file for room in ROOMS for file in sorted((HOUSE / room).rglob("*.py"))]


def test_nothing_is_unpickled_or_evaluated():
    found = {str(f.relative_to(HOUSE)): dangers(f.read_text()) for f in modules()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import torch.serialization",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "pd.read_pickle(path)",
        "tar.extractall(folder)",
    ],
)
def test_a_danger_is_found(line):
    assert dangers(line)


def test_what_is_safe_is_not_found():
    assert dangers("np.load(path, allow_pickle=False); json.loads(x); ast.literal_eval(x)") == []
