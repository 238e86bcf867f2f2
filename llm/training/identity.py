"""What a run is made of beside its config: code, libraries, data. Second floor.
A workdir keeps them; a resume with others is refused with the difference shown, unless allowed."""

import ast
import difflib
import functools
import importlib.metadata
import io
import json
import pathlib
import sys
import zipfile
from collections.abc import Mapping

from etils import epath

from llm.data.disk import read_json_object
from llm.training.files import canonical_json, text_digest, write_atomically
from llm.training.manifests import shorten
from llm.training.run_config import RunConfig, record_change

IDENTITY = "identity"  # in the workdir: code.json, libraries.json, data.json, code-….zip
_HOUSE = ("llm", "experiments", "configs")
_LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "numpy",
    "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin",
)  # fmt: skip

Facts = Mapping[str, str]


class IdentityChangedError(ValueError):
    """A workdir's run was made by other code, with other libraries, or of other data."""


class Identity:
    """What this process would run in a workdir, held against what the workdir's run began with."""

    def __init__(self, workdir: epath.PathLike, code: str, run_config: RunConfig):
        """`code` is the file with the training loop: it counts, with all that it imports."""
        self._workdir, self._run_config = epath.Path(workdir), run_config
        found = code_of(code)
        self._texts = {name: text for name, (_, text) in found.items()}
        self._code = {name: digest for name, (digest, _) in found.items()}

    def check(self) -> None:
        """Compare code and libraries.

        Raises:
          IdentityChangedError: they are others, and run.allow_code_change is not set.
        """
        self._check("libraries", library_versions())  # another Python reads code in another way
        self._check("code", self._code)

    def record(self) -> None:
        """Keep code and libraries in the workdir, and a note of what changed."""
        self._record("code", self._code)
        self._record("libraries", library_versions())

    def check_data(self, digests: Facts, *, record: bool) -> None:
        """Compare the digests of what is read, by name, and record them.

        Raises:
          IdentityChangedError: they are others, and run.allow_data_change is not set.
        """
        self._check("data", digests)
        if record:
            self._record("data", digests)

    def _check(self, kind: str, facts: Facts) -> None:
        kept = _read(self._workdir, kind)
        changed = [] if kept is None else _changed(kept, facts)
        option, allowed = "run.allow_code_change", self._run_config.allow_code_change
        if kind == "data":
            option, allowed = "run.allow_data_change", self._run_config.allow_data_change
        if changed and not allowed:
            old = _read_archive(self._workdir, kept) if kind == "code" else {}
            told = [_tell(name, kept, facts, old, self._texts) for name in changed]
            raise IdentityChangedError(
                f"workdir {self._workdir} was made with other {kind} ({shorten(told)}). Go back to "
                f"what it was, or use another workdir, or go on nevertheless with {option}=True"
            )

    def _record(self, kind: str, facts: Facts) -> None:
        kept = _read(self._workdir, kind)
        if kept == dict(facts):
            return
        folder = self._workdir / IDENTITY
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "code":
            (folder / _archive_name(facts)).write_bytes(_archive(self._texts))
        if kept is not None:
            changes = {
                f"{kind}: {name}": {"old": kept.get(name), "new": facts.get(name)}
                for name in _changed(kept, facts)
            }
            record_change(self._workdir, changes, forced=True)
        write_atomically(folder / f"{kind}.json", json.dumps(dict(facts), indent=2) + "\n")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_of(file: str) -> dict[str, tuple[str, str]]:
    """Return {path: (digest, text)} of a file and of all that it imports of the house's packages.

    The digest is of the syntax tree without docstrings: comments and layout do not count. A file is
    read once in a process, near its start: what is edited later does not run in it.
    """
    root = pathlib.Path(file).resolve().parent
    while (root / "__init__.py").exists():
        root = root.parent
    found: dict[str, tuple[str, str]] = {}
    pending = [pathlib.Path(file).resolve()]
    while pending:
        path = pending.pop()
        name = path.relative_to(root).as_posix()
        if name in found:
            continue
        digest, text, imports = _source(path)
        pending += [p for module in imports for p in _module_files(root, module)]
        found[name] = digest, text
    return {name: found[name] for name in sorted(found)}


@functools.cache
def _source(path: pathlib.Path) -> tuple[str, str, list[str]]:
    """Return a file's digest, its text, and what it imports."""
    text = path.read_text()
    tree = ast.parse(text)
    imports = _imports(tree)
    return text_digest(ast.dump(_without_docstrings(tree)))[:16], text, imports


def _imports(tree: ast.Module) -> list[str]:
    """Return what a module imports, each name that could be a module."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _module_files(root: pathlib.Path, module: str) -> list[pathlib.Path]:
    if module.split(".")[0] not in _HOUSE:
        return []
    stem = root.joinpath(*module.split("."))
    return [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return tree


def _read(workdir: epath.PathLike, kind: str) -> dict[str, str] | None:
    path = epath.Path(workdir) / IDENTITY / f"{kind}.json"
    if not path.exists():
        return None
    return read_json_object(path)


def _changed(kept: Facts, facts: Facts) -> list[str]:
    return [name for name in sorted(kept | facts) if kept.get(name) != facts.get(name)]


def _tell(name: str, kept: Facts, facts: Facts, old: Facts, new: Facts) -> str:
    """Return in a few words how one fact changed: a source by its first line that did."""
    if name in old and name in new:
        lines = list(difflib.unified_diff(old[name].splitlines(), new[name].splitlines(), n=0))[3:]
        shown = [line for line in lines if line[1:].strip() and line[0] in "-+"][:2]
        return f"{name}: {' '.join(' '.join(line.split()) for line in shown)}"
    return f"{name}: {_short(kept.get(name))} → {_short(facts.get(name))}"


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 16 else f"{value[:12]}…"


def _archive_name(facts: Facts) -> str:
    return f"code-{text_digest(canonical_json(dict(facts)))[:12]}.zip"


def _archive(sources: Facts) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sources.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _read_archive(workdir: epath.PathLike, kept: Facts) -> dict[str, str]:
    path = epath.Path(workdir) / IDENTITY / _archive_name(kept)
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return {name: archive.read(name).decode() for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError):
        return {}
