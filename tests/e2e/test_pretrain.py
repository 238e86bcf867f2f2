"""experiments.pretrain, inspect and evaluate as a user runs them, on eight fake devices."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from llm.training.loading import load_params
from llm.training.metrics import read_metrics

SEQUENCES, LENGTH = 8, 32


def run(module, *arguments, expect=0):
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty documents over a small vocabulary: enough for two epochs of tiny batches."""
    random = np.random.default_rng(0)
    words = ["the", "ship", "sails", "home", "over", "a", "calm", "sea", "and", "sinks"]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            file.write(json.dumps({"text": " ".join(random.choice(words, 60))}) + "\n")
    return path


@pytest.fixture(scope="module")
def arguments(corpus):
    """A model of one layer on bytes: the shipped tiny recipe with the corpus replaced."""
    recipe = corpus.parent / "recipe.py"
    recipe.write_text(
        f"""
from configs import pretrain_tiny
from configs.dataclass_config import to_config_dict
from llm.data.config import SourceConfig
from llm.models.presets import from_depth


def get_config(arg=None):
    config = pretrain_tiny.get_config()
    config.model = to_config_dict(from_depth(1, vocab_size=300, max_length_tokens={LENGTH}))
    source = SourceConfig(paths=({str(corpus)!r},), validation_fraction=0.2)
    config.data.sources = {{"text": to_config_dict(source)}}
    config.data.tokenizer.kind = "bytes"
    config.data.length_tokens, config.data.batch_sequences = {LENGTH}, {SEQUENCES}
    config.mesh.data, config.mesh.fsdp = 4, 2
    config.total_steps = 4
    config.schedule.warmup_steps = config.schedule.decay_steps = 2
    config.evaluation.every_steps, config.evaluation.prompts = 2, ()
    config.run.log_every_steps = 1
    return config
"""
    )
    return [f"--config={recipe}", f"--config.data.cache_dir={corpus.parent / 'cache'}"]


@pytest.fixture(scope="module")
def whole(arguments, corpus):
    workdir = corpus.parent / "whole"
    run("pretrain", *arguments, f"--workdir={workdir}")
    return workdir


def test_four_steps_are_two_and_two_bitwise(arguments, whole, corpus):
    """Stopped after two steps by the schedule of saves, gone on with by the same command."""
    workdir = corpus.parent / "parts"
    stop_after_two = (
        "import experiments.pretrain as p, llm.training.run as r, sys\n"
        "real = r.Run.after_step\n"
        "def leave(self, state, metrics):\n"
        "    state = real(self, state, metrics)\n"
        "    if self.step == 2: import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return state\n"
        "r.Run.after_step = leave\n"
        "from experiments import entry\n"
        "entry.run(p.main, p.PretrainConfig)\n"
    )
    command = [sys.executable, "-c", stop_after_two, *arguments, f"--workdir={workdir}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    run("pretrain", *arguments, f"--workdir={workdir}")
    assert load_params(workdir).digest == load_params(whole).digest

    def facts(path):
        return [{k: v for k, v in row.items() if "perf/" not in k} for row in read_metrics(path)]

    assert facts(workdir) == facts(whole)


def test_metrics_tell_loss_bits_per_byte_and_tokens(whole):
    rows = read_metrics(whole)
    first = next(row for row in rows if row["step"] == 1)
    # fan_in initialisation with zero residual outputs: the first loss is near that of a guess
    assert first["train/loss"] == pytest.approx(math.log(300), rel=0.15)
    last = [row for row in rows if "eval/text/loss" in row][-1]
    assert last["step"] == 4
    # a byte is a token here, and each document of n bytes has n + 1 targets (its EOS)
    per_byte = last["eval/text/bits_per_byte"] * math.log(2) / last["eval/text/loss"]
    assert 1.0 < per_byte < 1.01


def test_inspect_prints_one_json_object(whole):
    report = json.loads(run("inspect", f"--workdir={whole}", "--verify", "--json").stdout)
    assert report["step"] == 4 and report["tokens_seen"] == 4 * SEQUENCES * LENGTH
    width = 64
    layer = 4 * width**2 + 8 * width**2 + 2 * width + 2 * 64
    assert report["parameters"] == 2 * 300 * width + layer + width
    assert all(not step["problems"] for step in report["verified"])
    shown = run("inspect", f"--workdir={whole}").stdout
    assert "cycle/layer_0/attention/query/kernel" in shown and report["params_digest"] in shown


def test_evaluate_scores_a_file_as_the_model_does(whole, corpus):
    text = corpus.parent / "held_out.txt"
    text.write_text("the calm sea sinks the ship and the ship sails home")
    report = json.loads(run("evaluate", f"--workdir={whole}", f"--text={text}", "--json").stdout)
    num_bytes = len(text.read_bytes())
    assert report["tokens"] == num_bytes  # each byte a token, predicted from BOS on
    expected = report["loss_nats_per_token"] * report["tokens"] / math.log(2) / num_bytes
    assert report["bits_per_byte"] == pytest.approx(expected, rel=1e-9)
    assert 2.0 < report["loss_nats_per_token"] < math.log(300) * 1.1


MISTAKES = {
    "a misspelt field": (["--config.optimizer.lerning_rate=1"], "did you mean learning_rate?"),
    "an ill-typed value": (["--config.optimizer.learning_rate=fast"], "learning_rate"),
    "a misspelt flag": (["--wrkdir=x"], "--workdir"),
    "an impossible mesh": (["--config.mesh.tensor=3"], "needs 24 devices but there are 8"),
    "an unreadable source": (["--config.data.sources.text.paths=('/nowhere/*.txt',)"], "/nowhere"),
    "too long a warm-up": (["--config.schedule.warmup_steps=9"], "exceed the run's 4 steps"),
    "too small a vocabulary": (["--config.model.vocab_size=100"], "set model.vocab_size=262"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, arguments, tmp_path):
    overrides, words = MISTAKES[mistake]
    done = run("pretrain", *arguments, f"--workdir={tmp_path / 'w'}", *overrides, expect=2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_workdir_of_another_config_is_refused_with_the_difference(arguments, whole):
    other = "--config.optimizer.learning_rate=0.5"
    done = run("pretrain", *arguments, f"--workdir={whole}", other, expect=2)
    assert "optimizer.learning_rate" in done.stderr and "0.02" in done.stderr
