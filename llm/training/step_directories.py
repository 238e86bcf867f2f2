"""What is done to a checkpoint step's directory as a whole, on a file system and on a store.

A file system renames it. On a store an object beside it, `corrupt-6` or `deleted-6`, says that
step 6 is not there, and its files are put in place before the manifest that makes it valid.
"""

import shutil

from etils import epath

from llm.training.files import is_local
from llm.training.store_paths import StorePath

TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's mark on a directory that it has not committed
_DELETED, _CORRUPT = "deleted-", "corrupt-"


def step_numbers(directory: epath.Path) -> list[int]:
    """Return the steps that have a directory, valid or not, in order."""
    if not directory.exists():
        return []
    names = {path.name for path in directory.iterdir()}
    steps = sorted(int(name) for name in names if name.isdecimal())
    if is_local(directory):
        return steps
    return [step for step in steps if names.isdisjoint((f"{_CORRUPT}{step}", f"{_DELETED}{step}"))]


def set_aside(directory: epath.Path, step: int, problem: str) -> str:
    """Let a corrupt step be there no more but for a person to look at; return where it is now."""
    target, copies = directory / f"{_CORRUPT}{step}", 1
    if isinstance(directory, StorePath):
        target.write_text(problem + "\n")
        return f"{step}, which {target.name} explains"
    while target.exists():
        copies += 1
        target = directory / f"{_CORRUPT}{step}-{copies}"
    (directory / str(step)).rename(target)
    return target.name


def delete(directory: epath.Path, step: int) -> None:
    """Delete a step; a crash in the middle must not leave one that looks whole."""
    doomed = directory / f"{_DELETED}{step}"
    if isinstance(directory, StorePath):
        doomed.write_bytes(b"deleted\n")
        (directory / str(step)).rmtree(missing_ok=True)
        doomed.unlink()
    else:
        (directory / str(step)).rename(doomed)
        doomed.rmtree()


def remove_remains(directory: epath.Path) -> None:
    """Remove what a killed run was saving or deleting."""
    for path in directory.iterdir():
        if path.name.startswith(_DELETED) and not is_local(directory):
            delete(directory, int(path.name.removeprefix(_DELETED)))
        elif TEMPORARY in path.name or path.name.startswith(_DELETED):
            path.rmtree()


def make_room(directory: epath.Path, step: int) -> None:
    """Prepare for a save: on a store what lies there, a corrupt step set aside, makes room.

    Raises:
      OSError: no directory can be made. Orbax would wait for it for minutes.
    """
    if isinstance(directory, StorePath):
        if (directory / str(step)).exists():
            delete(directory, step)
        (directory / f"{_CORRUPT}{step}").unlink(missing_ok=True)
    else:
        path = directory / f"{_DELETED}probe"
        path.mkdir(parents=True, exist_ok=True)
        path.rmdir()


def publish(staged: epath.Path, step_dir: epath.Path, names: list[str]) -> None:
    """Bring files from where they were saved to where they belong, if that is elsewhere."""
    if isinstance(step_dir, StorePath):
        step_dir.upload(staged, names)
        shutil.rmtree(staged)
