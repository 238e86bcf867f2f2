"""experiments.scaling as a user runs it: listed, cut short, gone on with."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

from configs.command_line import load_config
from configs.schema import ScalingConfig
from experiments.ladder import groups_of, recipe_of
from llm.data.tokenizer_training import make_tokenizer
from llm.training.metrics import read_metrics

RECIPE = """
from configs.dataclass_config import to_config_dict
from configs.schema import ScalingConfig
from llm.data.config import SourceConfig
from llm.scaling.config import LadderConfig
from llm.training.config import OptimizerConfig, ScheduleConfig


def get_config(arg=None):
    common = dict(width_per_layer=16, head_dim=8, optimizer=OptimizerConfig(learning_rate=1e-2),
                  schedule=ScheduleConfig(name="linear", warmup_steps=1))
    config = to_config_dict(ScalingConfig(ladders={{
        "rates": LadderConfig(depths=(1, 2), num_layers=1, tokens=(1536,), seeds=(0, 1),
                              learning_rates=(1e-2, 3e-2), **common),
        "repeated": LadderConfig(depths=(1,), tokens=(2048,), unique_tokens=(None, 512),
                                 learning_rates=(1e-2,), **common),
    }}))
    config.data.sources = {{"text": to_config_dict(SourceConfig(paths=({corpus!r},),
                                                              validation_fraction=0.2))}}
    config.data.tokenizer.kind = "bytes"
    config.data.length_tokens, config.data.batch_sequences = 32, 8
    config.data.cache_dir = {cache!r}
    config.num_evaluations = 2
    config.run.log_every_steps = 1
    return config
"""


def run(*arguments, expect=0, module="scaling"):
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    words = ["the", "ship", "sails", "home", "over", "a", "calm", "sea", "and", "sinks"]
    random = np.random.default_rng(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(random.choice(words, 60))}) + "\n")
    file = folder / "recipe.py"
    file.write_text(RECIPE.format(corpus=str(folder / "text.jsonl"), cache=str(folder / "cache")))
    return file


@pytest.fixture(scope="module")
def whole(recipe):
    """A ladder run to the end, after a dry run and a start that is broken off."""
    workdir = recipe.parent / "ladder"
    listed = run(f"--config={recipe}", f"--workdir={workdir}", "--dry_run").stdout
    assert "rates/d2_6steps" in listed and "repeated/d1_8steps_unique512" in listed
    assert not (workdir / "rates").exists()
    interrupt = (
        "import sys, experiments.scaling as s, experiments.entry as e, llm.training.run as r\n"
        "from configs.schema import ScalingConfig\n"
        "real = r.Run.after_step\n"
        "def leave(self, state, metrics):\n"
        "    state = real(self, state, metrics)\n"
        "    if 'd2_6steps' in str(self.workdir) and self.step == 2:\n"
        "        raise KeyboardInterrupt\n"
        "    return state\n"
        "r.Run.after_step = leave\n"
        "e.run(s.main, ScalingConfig)\n"
    )
    command = [sys.executable, "-c", interrupt, f"--config={recipe}", f"--workdir={workdir}"]
    cut = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert cut.returncode == 130, cut.stderr
    assert "interrupted" in cut.stderr
    done = run(f"--config={recipe}", f"--workdir={workdir}")
    assert "rates/d1_6steps: done before" in done.stdout
    return workdir


def table(workdir, name):
    with (workdir / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_evaluation_of_every_run_is_a_row(whole):
    rows = table(whole, "evaluations")
    assert pyarrow.parquet.read_table(whole / "evaluations.parquet").num_rows == len(rows)
    runs = {row["run"] for row in rows}
    assert len(runs) == 2 * 4 + 2
    steps = {row["step"] for row in rows if row["run"] == "rates/d1_6steps/0"}
    assert steps == {"0", "3", "6"}
    final = table(whole, "runs")
    assert {row["run"] for row in final} == runs and len(final) == len(runs)
    first = next(row for row in final if row["run"] == "rates/d2_6steps/3")
    assert (first["learning_rate"], first["seed"], first["tokens"]) == ("0.03", "1", "1536")
    by_unique = {row["unique_tokens"]: row for row in final if row["ladder"] == "repeated"}
    assert by_unique["512"]["regime"] == "repeated"
    assert float(by_unique["512"]["epochs"]) == 4.0
    assert len(by_unique) == 2


@pytest.mark.long
def test_a_member_is_its_single_run(whole, recipe):
    """Through the entry points: `experiments.pretrain` with the member's config."""
    config = load_config(str(recipe), [], ScalingConfig)
    groups = groups_of(config, make_tokenizer(config.data).vocab_size)
    group = next(group for group in groups if group.name == "rates/d1_6steps")
    single = recipe_of(config, group, group.members[3])
    file = recipe.parent / "single.py"
    file.write_text(
        "from configs.dataclass_config import to_config_dict\n"
        "from configs.schema import *\n"
        "from llm.data.config import *\n"
        f"CONFIG = {single!r}\n"
        "def get_config(arg=None):\n    return to_config_dict(CONFIG)\n"
    )
    workdir = recipe.parent / "single"
    command = [sys.executable, "-m", "experiments.pretrain", f"--config={file}"]
    command += [f"--workdir={workdir}", "--config.mesh.data=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_device())
    assert done.returncode == 0, done.stderr
    losses = {
        row["step"]: row["eval/text/loss"]
        for row in read_metrics(workdir)
        if "eval/text/loss" in row
    }
    for row in table(whole, "evaluations"):
        if row["run"] == "rates/d1_6steps/3" and row["step"] in ("3", "6"):
            assert float(row["loss"]) == pytest.approx(losses[int(row["step"])], rel=1e-5)
    assert (single.seed, single.optimizer.learning_rate) == (1, 3e-2)


def one_device():
    return os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def test_what_cannot_be_is_one_line(recipe, tmp_path):
    short = run(
        f"--config={recipe}",
        f"--workdir={tmp_path / 'run'}",
        "--config.ladders.rates.tokens=(100,)",
        expect=2,
    )
    assert "less than 2" in short.stderr and "Traceback" not in short.stderr
    typo = run(
        f"--config={recipe}",
        f"--workdir={tmp_path / 'run'}",
        "--config.ladders.rates.depth=(1,)",
        expect=2,
    )
    assert "did you mean depths" in typo.stderr
