"""An object store in memory, flat://: whole puts, no append, no rename, no directories."""

import contextlib
import io
import threading
from collections.abc import Callable, Iterator

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from llm.training.store_paths import StorePath

_LOCK = threading.RLock()


class FlatStore(MemoryFileSystem):
    """All instances hold the same objects. `before_change` is called before each change."""

    protocol = "flat"
    store: dict[str, MemoryFile] = {}
    pseudo_dirs = [""]
    before_change: Callable[[str, str], None] | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flat://"))

    def pipe_file(self, path, value, mode="overwrite", **options):
        name = self._strip_protocol(path)
        self._tell("put", name)
        with _LOCK:
            if mode == "create" and name in self.store:
                raise FileExistsError(path)
            self.store[name] = MemoryFile(self, name, bytes(value))

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **options):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read(), mode)

    def rm_file(self, path):
        self._tell("remove", self._strip_protocol(path))
        super()._rm(path)

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), f"{mode} is not for a store"
        return io.BytesIO(self.cat_file(path)) if mode == "rb" else Writing(self, path)

    def mkdir(self, path, create_parents=True, **options):
        raise PermissionError("a bucket is not this program's to make")

    def makedirs(self, path, exist_ok=False):
        raise PermissionError("a bucket is not this program's to make")

    def cp_file(self, path1, path2, **options):
        raise AssertionError("a copy of what may be a terabyte")

    def mv(self, path1, path2, **options):
        raise AssertionError("a store cannot rename")

    mv_file = move = rename = mv

    def _tell(self, change: str, name: str) -> None:
        if FlatStore.before_change is not None:
            FlatStore.before_change(change, name)


class Writing(io.BytesIO):
    """An object that is there when it is closed."""

    def __init__(self, store: FlatStore, path: str):
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store.pipe_file(self._path, self.getvalue())
        super().close()


def register() -> None:
    """Let fsspec and epath know flat://."""
    fsspec.register_implementation("flat", FlatStore, clobber=True)
    epath.register_path_cls("flat://")(StorePath)


@contextlib.contextmanager
def empty_store() -> Iterator[dict[str, MemoryFile]]:
    """Give the objects of the store, of which there are none yet."""
    register()
    FlatStore.store.clear()
    try:
        yield FlatStore.store
    finally:
        FlatStore.before_change = None
        FlatStore.store.clear()
