"""experiments.pretrain into an object store, stopped and gone on with; inspect reads it there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from llm.training.manifests import read_ledger
from tests.e2e.life import AFTER_TWO_STEPS, patched, write_life

FLAGS = ("--config.total_steps=4", "--config.data.packing=online")
WORKDIR = "flat://bucket/run"
# The store is in memory: between processes it is a file.
ON_STORE = """
import pathlib, pickle
from flat_store import FlatStore, MemoryFile, register
register()
file = pathlib.Path({file!r})
for name, content in (pickle.loads(file.read_bytes()) if file.exists() else {{}}).items():
    FlatStore.store[name] = MemoryFile(None, name, content)
def keep():
    file.write_bytes(pickle.dumps({{n: o.getvalue() for n, o in FlatStore.store.items()}}))
import atexit
atexit.register(keep)
"""
INSPECT = """
import experiments.inspect as inspect
from experiments import entry
from experiments.loading import load_model
assert load_model({workdir!r}).tokenizer.decode(list(b"sun")) == "sun"
entry.run(inspect.main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    write_life(folder)
    return folder


def run(folder, script, *flags, expect=0):
    helpers = pathlib.Path(__file__).parents[1] / "training"
    environment = {
        "PYTHONPATH": os.pathsep.join([str(helpers), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("count=8", "count=1"),
        "TMPDIR": str(folder / "temporary"),
    }
    (folder / "temporary").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout


def digests(rows):
    return {row["step"]: row["state_digest"] for row in rows}


@pytest.mark.long
def test_pretraining_on_a_store_is_stopped_and_gone_on_with_bitwise(folder):
    config = f"--config={folder / 'recipes.py'}:pretrain"
    store = ON_STORE.format(file=str(folder / "store.pickle"))
    stopped = patched("pretrain", store + AFTER_TWO_STEPS)
    run(folder, stopped, config, *FLAGS, f"--workdir={WORKDIR}", expect=75)
    run(folder, patched("pretrain", store), config, *FLAGS, f"--workdir={WORKDIR}")
    run(folder, patched("pretrain", ""), config, *FLAGS, f"--workdir={folder / 'local'}")
    inspect = store + INSPECT.format(workdir=WORKDIR)
    report = json.loads(run(folder, inspect, f"--workdir={WORKDIR}", "--verify", "--json"))
    assert report["steps"] == [2, 4] and report["step"] == report["total_steps"] == 4
    assert [step["problems"] for step in report["verified"]] == [[], []]
    assert digests(report["ledger"]) == digests(read_ledger(folder / "local"))
    assert list((folder / "temporary").iterdir()) == []  # nothing stays but on the store
