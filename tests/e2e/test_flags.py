"""Experiments as a user starts them: every kind of mistake is one line and an exit code."""

import ctypes
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.entry import ACCELERATOR_PACKAGES

HOUSE = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(
    file.stem
    for file in (HOUSE / "experiments").glob("*.py")
    if file.name != "entry.py" and "entry.run(" in file.read_text()
)

PROGRAM = '''
"""A small experiment on the shipped entry."""
import os, sys
import numpy as np
from absl import flags
from experiments import entry
from llm.parallel.config import MeshConfig

WORKDIR = flags.DEFINE_string("workdir", None, "Where.", required=True)
DO = flags.DEFINE_string("do", "return", "What main does.")
STEPS = flags.DEFINE_integer("steps", 1, "How often.")
JSON = entry.define_json()


class OwnError(RuntimeError):
    """What the house defines is meant for the user."""


def main(config):
    match DO.value:
        case "return":
            print("tensor", config.tensor)
        case "json":
            print("chatter of Python")
            os.system("echo chatter of a child")
            os.write(1, b"chatter of C\\n")
            entry.print_json({"loss": np.float32(1.5), "nan": float("nan"), "mesh": config,
                              "shape": (1, np.int64(2)), "array": np.arange(2)})
        case "mistake":
            raise ValueError("batch_sequences 3 is not divisible by 2 devices; try 2")
        case "own":
            raise OwnError("the workdir belongs to another config")
        case "path":
            open("no/such/file")
        case "bug":
            int("three")
        case "interrupt":
            raise KeyboardInterrupt
        case "preempted":
            sys.exit(75)
        case "flood":
            for i in range(100_000):
                print("line", i)


if __name__ == "__main__":
    entry.run(main, MeshConfig, default_config="recipe.py")
'''
RECIPE = """
from configs.dataclass_config import to_config_dict
from llm.parallel.config import MeshConfig

def get_config(arg=None):
    return to_config_dict(MeshConfig(tensor=int(arg or 1)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "recipe.py").write_text(RECIPE)
    # A JAX that cannot be imported: a mistake must be told without it.
    (folder / "no_jax").mkdir()
    (folder / "no_jax" / "jax.py").write_text("raise ImportError('JAX was imported')")
    return folder


def start(folder, *arguments, jax=False, **options) -> subprocess.CompletedProcess:
    paths = [str(HOUSE)] if jax else [str(folder / "no_jax"), str(HOUSE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LLM_CACHE": str(folder)}
    if not jax:  # the cache is the one thing in entry that loads JAX
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    command = [sys.executable, "program.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--wrkdir=w"], "error: unknown flag --wrkdir; did you mean --workdir?"),
        (["--tensor=2"], "error: unknown flag --tensor; did you mean --config.tensor?"),
        (["--zzzzz=w"], "error: unknown flag --zzzzz; --help lists the flags"),
        ([], "error: --workdir is required"),
        (["--workdir=w", "go"], "error: unexpected argument 'go': flags are --name=value"),
        (
            ["--workdir=w", "--steps=many"],
            "error: flag --steps=many: invalid literal for int() with base 10: 'many'",
        ),
        (
            ["--workdir=w", "--config.tensr=2"],
            "error: config has no field 'tensr'; did you mean tensor?",
        ),
        (
            ["--workdir=w", "--config.tensor=two"],
            "error: config.tensor must be int, got 'two' (str)",
        ),
        (["--workdir=w", "--config=recip.py"], "error: no recipe 'recip.py'"),
        (
            ["--workdir=w", "--config=recipe.py:two"],
            "error: recipe recipe.py:6: invalid literal for int() with base 10: 'two'",
        ),
        (["--workdir=w", "--config="], "error: no recipe ''"),
        (
            ["--workdir=w", "--do=mistake"],
            "error: batch_sequences 3 is not divisible by 2 devices; try 2",
        ),
        (["--workdir=w", "--do=own"], "error: the workdir belongs to another config"),
        (
            ["--workdir=w", "--do=path"],
            "error: No such file or directory: no/such/file",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, arguments, line):
    result = start(folder, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line + "\n")


def test_a_bug_keeps_its_traceback_and_a_mistake_shows_it_on_request(folder):
    bug = start(folder, "--workdir=w", "--do=bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "three" in bug.stderr
    mistake = start(folder, "--workdir=w", "--do=mistake", "--verbosity=1")
    assert mistake.returncode == 1 and "Traceback" in mistake.stderr


def test_config_reaches_main_with_argument_and_overrides(folder):
    plain = start(folder, "--workdir=w", "--config=recipe.py:4")
    assert (plain.returncode, plain.stdout) == (0, "tensor 4\n")
    overridden = start(folder, "--config.tensor", "8", "--workdir=w", jax=True)
    assert (overridden.returncode, overridden.stdout) == (0, "tensor 8\n"), overridden.stderr


DETERMINISTIC = """
import os, sys
from experiments import entry
from configs.schema import SpeedrunConfig

def main(config):
    import jax
    print(jax.numpy.ones(3).sum(), os.environ["XLA_FLAGS"])

if __name__ == "__main__":
    entry.run(main, SpeedrunConfig)
"""


def test_deterministic_kernels_are_asked_for_before_jax_starts():
    arguments = [f"--config={HOUSE / 'configs/speedrun.py'}", "--config.rlhf.compute.deterministic"]
    run = [sys.executable, "-c", DETERMINISTIC]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for given, expected in ((arguments[:1], False), ([*arguments, "true"], True)):
        done = subprocess.run([*run, *given], env=environment, capture_output=True, text=True)
        assert done.stdout.startswith("3.0 "), done.stderr
        assert ("--xla_gpu_deterministic_ops=true" in done.stdout) == expected


def test_json_is_the_only_thing_on_standard_output(folder):
    result = start(folder, "--workdir=w", "--do=json", "--json")
    assert result.returncode == 0
    mesh = {"data": -1, "fsdp": 1, "expert": 1, "pipeline": 1, "context": 1, "tensor": 1}
    mesh["across_slices"] = "auto"
    assert json.loads(result.stdout) == {
        "loss": 1.5,
        "nan": None,
        "mesh": mesh,
        "shape": [1, 2],
        "array": [0, 1],
    }
    assert result.stderr.count("chatter") == 3


def test_interrupt_preemption_and_broken_pipe(folder):
    interrupted = start(folder, "--workdir=w", "--do=interrupt")
    assert (interrupted.returncode, interrupted.stderr) == (130, "interrupted\n")
    assert start(folder, "--workdir=w", "--do=preempted").returncode == 75
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "JAX_COMPILATION_CACHE_DIR": str(folder)}
    command = [sys.executable, "program.py", "--workdir=w", "--do=flood"]
    flood = subprocess.run(
        command, cwd=folder, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert (flood.returncode, flood.stderr) == (141, b"")


def test_help_shows_the_experiment_and_its_flags(folder):
    text = start(folder, "--help").stdout
    assert "A small experiment" in text
    for flag in ("--config", "--workdir", "--[no]json"):
        assert flag in text


# they share the entry that reads flags: two that import little and much stand for the others
@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=[] if name in ("fit", "speedrun") else [pytest.mark.long])
        for name in EXPERIMENTS
    ],
)
def test_every_experiment_refuses_a_misspelt_flag(experiment):
    command = [sys.executable, "-m", f"experiments.{experiment}", "--wrkdirr=x"]
    environment = os.environ | {"JAX_PLATFORMS": "none"}  # starting JAX's backend would fail
    result = subprocess.run(
        command, cwd=HOUSE, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown flag --wrkdirr")
    assert result.stderr.count("\n") == 1


KEPT = """
import ctypes
from experiments.entry import tune_for_cpu

tune_for_cpu()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
place = libc.malloc(100_000_000)
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0]
first, last = (int(x, 16) for x in heap.split("-"))
libc.free(place)
after = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0]
print(first <= place < last, after == heap)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    or any(importlib.util.find_spec(name) for name in ACCELERATOR_PACKAGES),
    reason="for CPU hosts with glibc",
)
def test_freed_memory_is_kept_on_cpu_hosts():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]  # a large buffer is of the heap, which stays
    default = KEPT.replace("\ntune_for_cpu()", "")
    done = subprocess.run(
        [sys.executable, "-c", default], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == "False"
