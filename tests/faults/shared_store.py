"""An object store that real processes share, shared://: its objects are files below a directory.

Puts are whole, a create is of one process alone, and append and rename are refused.
"""

import contextlib
import os
import pathlib
import shutil
import uuid

import fsspec
from etils import epath
from fsspec.implementations.local import LocalFileSystem

from llm.training.store_paths import StorePath
from tests.training.flat_store import Writing

# To be run first in a child process, as a patch.
IN_A_CHILD = """
from tests.faults import shared_store
shared_store.register({root!r})
import llm.training.lease as lease
lease.RENEW_SECONDS, lease.STALE_SECONDS, lease.SETTLE_SECONDS = 1.0, 10.0, 0.5
"""


class SharedStore(LocalFileSystem):
    protocol = "shared"
    root = ""

    @classmethod
    def _strip_protocol(cls, path):
        if path.startswith("shared://"):
            path = f"{cls.root}/objects/{path.removeprefix('shared://')}"
        return super()._strip_protocol(path)

    def pipe_file(self, path, value, mode="overwrite", **options):
        target = pathlib.Path(self._strip_protocol(path))
        whole = pathlib.Path(self.root, f"put-{uuid.uuid4().hex}")
        whole.write_bytes(value)
        while True:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Another process may remove a directory that is empty yet.
            with contextlib.suppress(FileNotFoundError):
                if mode == "create":
                    os.link(whole, target)
                    whole.unlink()
                else:
                    whole.replace(target)
                return

    def put_file(self, path1, path2, callback=None, **options):
        self.pipe_file(path2, pathlib.Path(path1).read_bytes())

    def get_file(self, path1, path2, callback=None, **options):
        shutil.copyfile(self._strip_protocol(path1), path2)

    def rm_file(self, path):
        path = pathlib.Path(self._strip_protocol(path))
        path.unlink()
        with contextlib.suppress(OSError):  # a store has no directory without objects
            while True:
                path = path.parent
                path.rmdir()

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), f"{mode} is not for a store"
        return super()._open(path, mode, **options) if mode == "rb" else Writing(self, path)

    def mkdir(self, path, create_parents=True, **options):
        raise PermissionError("a bucket is not this program's to make")

    def mv(self, path1, path2, **options):
        raise AssertionError("a store cannot rename")

    mv_file = move = rename = cp_file = mv


def register(root: str) -> None:
    """Let fsspec and epath know shared://, whose objects are below a directory."""
    SharedStore.root = root
    fsspec.register_implementation("shared", SharedStore, clobber=True)
    epath.register_path_cls("shared://")(StorePath)
