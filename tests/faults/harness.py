"""The real entry points as child processes that are killed, and what they leave behind."""

import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llm.training.manifests import LEDGER, list_steps, read_ledger
from llm.training.metrics import TEXTS, read_metrics
from tests.e2e.life import module_of, patched, write_life

# Each begins with what the one before has made.
STAGES = ("pretrain", "finetune", "reward", "preference", "rlhf", "rlhf_dynamic", "scaling")
SAVE_EVERY_STEPS = 2
_PATIENCE_SECONDS = 300.0


class Kill(NamedTuple):
    """A kill -9: the steps logged and committed by then."""

    logged_step: int
    committed_step: int


def start(
    stage: str, folder: pathlib.Path, workdir: pathlib.Path, *flags: str, patch: str | None = None
) -> subprocess.Popen:
    """Start a stage of the life in `folder`; `patch` is code that breaks something in it first."""
    module = ["-m", f"experiments.{module_of(stage)}"]
    entry = module if patch is None else ["-c", patched(stage, patch)]
    arguments = (f"--config={folder / 'recipes.py'}:{stage}", f"--workdir={workdir}", *flags)
    command = [sys.executable, *entry, *arguments]
    one_device = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("count=8", "count=1")}
    return subprocess.Popen(
        command,
        env=os.environ | one_device,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(
    stage: str,
    folder: pathlib.Path,
    workdir: pathlib.Path,
    *flags: str,
    patches: Sequence[str | None] = (None, None),
) -> list[subprocess.Popen]:
    """Start as many processes of one run as there are patches, each with its own; all in the same
    way, since processes compare the code that they were started with."""
    processes = process_flags(len(patches))
    return [
        start(stage, folder, workdir, *flags, process, patch=patch or "pass")
        for process, patch in zip(processes, patches, strict=True)
    ]


def process_flags(count: int) -> list[str]:
    """Return the flag of each of so many processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [f"--process={index}/{count}@localhost:{port}" for index in range(count)]


def finish(child: subprocess.Popen, expect: int = 0) -> str:
    """Wait for a child and return what it said on standard error."""
    said = child.communicate(timeout=_PATIENCE_SECONDS)[1]
    assert child.returncode == expect, said
    return said


def wait_until(ready: Callable[[], object], child: subprocess.Popen) -> None:
    """Wait while a child runs until something is so."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not ready():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


def make_life(folder: pathlib.Path, stages: Mapping[str, Sequence[str]]) -> None:
    """Write the data of a life and run stages, with flags, each in a workdir of its name."""
    write_life(folder)
    for stage, own in stages.items():
        finish(start(stage, folder, folder / stage, *own))


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """Return all that runs below a workdir have left but for what a clock decides.

    By run: its ledger, which has the digest of every step's whole state and the data cursor; its
    metrics without perf/; its texts. And the tables of a ladder.
    """
    found: dict[str, Any] = {}
    for ledger in sorted(workdir.rglob(LEDGER)):
        run, name = ledger.parent, str(ledger.parent.relative_to(workdir))
        found[f"{name}: ledger"] = [
            {key: x for key, x in row.items() if key != "time"} for row in read_ledger(run)
        ]
        found[f"{name}: metrics"] = [
            {key: x for key, x in row.items() if not key.startswith("perf/")}
            for row in read_metrics(run)
        ]
        texts = run / TEXTS
        found[f"{name}: texts"] = texts.read_text() if texts.exists() else None
    for table in sorted(workdir.glob("*.csv")):
        found[table.name] = table.read_text()
    return found


def run_with_kills(
    stage: str,
    folder: pathlib.Path,
    workdir: pathlib.Path,
    chance: random.Random,
    num_kills: int,
    *flags: str,
    patch: str | None = None,
) -> list[Kill]:
    """Start a stage again and again, killed each time, and in the end let it finish.

    One kill in five comes at any time of the start, import and restoring included; the others at a
    random moment after the first new step, while steps are taken and saved.
    """
    kills: list[Kill] = []
    for _ in range(num_kills):
        before, began = _progress(workdir), time.monotonic()
        child = start(stage, folder, workdir, *flags, patch=patch)
        if chance.random() < 0.2:
            _sleep_or_exit(child, chance.uniform(0.0, 8.0))
        else:
            while child.poll() is None and _progress(workdir) == before:
                assert time.monotonic() - began < _PATIENCE_SECONDS, "no step is taken"
                time.sleep(0.005)
            _sleep_or_exit(child, chance.uniform(0.0, 0.5))
        if child.poll() is not None:
            finish(child)  # it was done before the kill
            return kills
        child.kill()
        child.communicate()
        logged, committed = _steps(workdir)
        kills.append(Kill(logged, committed))
    finish(start(stage, folder, workdir, *flags, patch=patch))
    return kills


def _sleep_or_exit(child: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def _progress(workdir: pathlib.Path) -> tuple:
    """Return what changes whenever a step is logged anywhere below the workdir."""
    logs = sorted(workdir.rglob("metrics.jsonl")) if workdir.exists() else []
    return tuple((str(path), path.stat().st_size) for path in logs)


def _steps(workdir: pathlib.Path) -> tuple[int, int]:
    """Return the last step logged and the last committed of the run that was written last."""
    logs = list(workdir.rglob("metrics.jsonl")) if workdir.exists() else []
    if not logs:
        return 0, 0
    run = max(logs, key=lambda path: path.stat().st_mtime).parent
    rows, steps = read_metrics(run), list_steps(run)
    return (int(rows[-1]["step"]) if rows else 0), (steps[-1] if steps else 0)
