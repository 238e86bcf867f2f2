"""A directory that appears under its name only when whole. Interop floor."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a directory to write into, which gets its name when the block ends without an error.

    Raises:
      ValueError: it exists already and is not empty.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name another, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield aside
        # mkdtemp's directories and safetensors' files are for their owner alone
        mask = _umask()
        for path in aside.iterdir():
            path.chmod(0o666 & ~mask)
        aside.chmod(0o777 & ~mask)
        os.rename(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
