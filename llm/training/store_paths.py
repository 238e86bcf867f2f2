"""Paths on object stores (gs://, s3://, every scheme of fsspec), for all who use `epath.Path`.

An object is put whole or not at all, and a directory is no more than a common beginning of names.
A store cannot append, which is refused here, nor rename: that is a copy and a removal, for TFDS;
nothing in this package asks for it.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
from etils import epath
from etils.epath import stat_utils

# Packages that fsspec needs for a scheme, as extras of this one.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_LOCAL_SCHEMES = ("file", "local")


class StoreError(OSError):
    """An object store cannot be reached, or refuses what it is asked for."""


class MissingPackageError(ImportError):
    """A path's scheme needs a package that is not installed."""


@epath.register_path_cls(
    [f"{scheme}://" for scheme in fsspec.available_protocols() if scheme not in _LOCAL_SCHEMES]
)
class StorePath(epath.Path):
    """A path on an object store. `epath.Path("gs://bucket/run")` makes one.

    Every method that asks the store raises StoreError where it cannot be reached, and
    MissingPackageError where the package for its scheme is missing.
    """

    def __str__(self) -> str:
        first, *rest = self.parts or (".",)
        return f"{first}//{'/'.join(rest)}" if first.endswith(":") else "/".join(self.parts) or "."

    def __fspath__(self) -> str:
        return str(self)

    def expanduser(self) -> "StorePath":
        return self

    def resolve(self, strict: bool = False) -> "StorePath":
        return self

    def exists(self) -> bool:
        return self._ask("exists")

    def is_dir(self) -> bool:
        return self._ask("isdir")

    def iterdir(self) -> Iterator["StorePath"]:
        own = self._name(self)
        for name in self._ask("ls", detail=False):
            if name.rstrip("/") != own:  # some tools mark a directory by an object of its name
                yield self / name.rstrip("/").rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        own = self._name(self)
        for name in (self / pattern)._ask("glob"):
            yield self / name[len(own) :].strip("/")

    def sizes_bytes(self) -> dict[str, int]:
        """Return the size of every object below this path, by its relative name."""
        own = self._name(self)
        found = self._ask("find", detail=True)
        return {name[len(own) :].lstrip("/"): about["size"] for name, about in found.items()}

    def stat(self) -> stat_utils.StatResult:
        about = self._ask("info")
        changed = about.get("mtime") or about.get("LastModified") or 0
        return stat_utils.StatResult(
            is_directory=about["type"] == "directory",
            length=about["size"],
            mtime=int(changed.timestamp() if hasattr(changed, "timestamp") else changed),
        )

    def open(self, mode: str = "r", **options: Any):
        if mode.strip("bt") not in ("r", "w"):
            raise io.UnsupportedOperation(f"{self}: an object store has no mode {mode!r}")
        if "b" not in mode:
            options.setdefault("encoding", "utf-8")
        return self._ask("open", mode=mode, **options)

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        """Put the whole object; a reader sees the old one or the new one."""
        self._ask("pipe_file", data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))
        return len(data)

    def create(self, data: bytes) -> None:
        """Put an object where there is none, which the store itself decides.

        Raises:
          FileExistsError: there is one.
        """
        self._ask("pipe_file", data, mode="create")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: fsspec would make a bucket of a misspelt name."""

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok):
            self._ask("rm_file")

    def rmtree(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok):
            self._ask("rm", recursive=True)

    def rmdir(self) -> None:
        """Do nothing: a directory without objects is none."""

    def walk(self, *, top_down: bool = True, on_error: Any = None):
        own = self._name(self)
        for top, directories, files in self._ask("walk", topdown=top_down):
            yield self / top[len(own) :].strip("/"), directories, files

    def copy(self, dst: epath.PathLike, overwrite: bool = False) -> "StorePath":
        target = type(self)(dst)
        if not overwrite and target.exists():
            raise FileExistsError(17, "it exists", os.fspath(target))
        self._ask("copy", self._name(target))
        return target

    def rename(self, target: epath.PathLike) -> "StorePath":
        self._ask("mv", self._name(type(self)(target)), recursive=True)
        return type(self)(target)

    replace = rename

    def upload(self, directory: epath.Path, names: Sequence[str]) -> None:
        """Put local files below this path, several at a time.

        Raises:
          StoreError: they are not all there afterwards, each in its size.
        """
        if not names:
            return
        local = [os.fspath(directory / name) for name in names]
        self._ask("put", local, [self._name(self / name) for name in names], path_first=False)
        there = self.sizes_bytes()
        for name, file in zip(names, local, strict=True):
            size = os.path.getsize(file)
            if there.get(name) != size:
                raise StoreError(f"{self / name} has {there.get(name)} bytes after a put of {size}")

    def download(self, directory: epath.Path, names: Sequence[str] | None = None) -> None:
        """Get objects below this path into a local directory, several at a time.

        All of them, or those of some names that there are.
        """
        wanted = None if names is None else set(names)
        names = [name for name in self.sizes_bytes() if wanted is None or name in wanted]
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        local = [os.fspath(directory / name) for name in names]
        self._ask("get", [self._name(self / name) for name in names], local, path_first=False)

    def _ask(self, method: str, *arguments: Any, path_first: bool = True, **options: Any) -> Any:
        try:
            path = (self._name(self),) if path_first else ()
            return getattr(self._store(), method)(*path, *arguments, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(2, f"nothing there ({error})", os.fspath(self)) from error
        except FileExistsError as error:
            raise FileExistsError(17, "it exists", os.fspath(self)) from error
        except MissingPackageError:
            raise
        except Exception as error:  # each package has its own for networks and credentials
            raise StoreError(f"{self}: {type(error).__name__}: {error}") from error

    def _store(self) -> fsspec.AbstractFileSystem:
        scheme = self.parts[0].removesuffix(":")
        try:
            # Listings kept from before would hide what other processes, and threads, have put.
            return fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f"pip install -e '.[{extra}]'" if extra else str(error)
            raise MissingPackageError(
                f"{self} needs a package that is not installed: {remedy}"
            ) from error

    def _name(self, path: "StorePath") -> str:
        return self._store()._strip_protocol(os.fspath(path)).rstrip("/")
