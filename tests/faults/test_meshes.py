"""A pretraining run whose devices change at every restart, through the real entry point: the state
is restored to the bit, the batches are those of the unbroken run, and the loss follows it.

The tolerance: sums over a batch and over a sharded dimension are taken in another order, which in
float32 moves a loss by some 1e-7 of itself, 1e-6 after eight steps of Muon; 1e-5 leaves room.
"""

import dataclasses
import hashlib
import itertools
import json
import signal

import jax
import numpy as np
import pytest

from configs.schema import EvaluationConfig, PretrainConfig
from experiments import assembly
from experiments import pretrain as entry_point
from llm.data.config import DataConfig, SourceConfig, TokenizerConfig
from llm.models.presets import from_depth
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.digests import array_digests, combine_digests
from llm.training.manifests import read_ledger
from llm.training.metrics import read_metrics
from llm.training.run_config import RunConfig

LENGTH, TOTAL_STEPS = 32, 8
ONE = MeshConfig()
# Where each start ends, and on what devices it runs.
STARTS = {
    2: (1, ONE),
    4: (2, MeshConfig(fsdp=2)),
    6: (8, MeshConfig(fsdp=4, tensor=2)),
    TOTAL_STEPS: (4, MeshConfig(tensor=4)),
}


def write_source(folder, name, words, seed):
    random = np.random.default_rng(seed)
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for _ in range(30):  # from shorter than a row to longer: rows hold several, or a part
            text = " ".join(random.choice(words, random.integers(2, 16)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_config(folder):
    sources = {
        name: SourceConfig(
            paths=(str(write_source(folder, name, words, seed)),),
            weight=weight,
            validation_fraction=0.0,
        )
        for seed, (name, words, weight) in enumerate(
            (("sea", ("sun", "sand", "wind"), 2.0), ("town", ("tram", "roof", "smoke"), 1.0))
        )
    }
    return PretrainConfig(
        model=from_depth(1, vocab_size=264, max_length_tokens=LENGTH, head_dim=16),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=3e-3),
        schedule=ScheduleConfig(name="linear", warmup_steps=1),
        data=DataConfig(
            sources=sources,
            tokenizer=TokenizerConfig(kind="bytes"),
            cache_dir=str(folder / "cache"),
            length_tokens=LENGTH,
            batch_sequences=8,
            num_workers=0,
        ),
        evaluation=EvaluationConfig(every_steps=0, prompts=()),
        total_steps=TOTAL_STEPS,
        run=RunConfig(log_every_steps=1, save_every_steps=0, keep_newest_checkpoints=9),
    )


class Recorder:
    """Between the entry point and its step: notes each batch, and the state that a start begins
    with; sends the signal that ends a start after its last step."""

    def __init__(self, monkeypatch):
        self.batches, self.first_digests, self.num_packed = [], [], 0
        self._make_train_step = assembly.make_train_step
        monkeypatch.setattr(assembly, "make_train_step", self.make_train_step)

    def make_train_step(self, *arguments, **options):
        step = self._make_train_step(*arguments, **options)
        calls = itertools.count()

        def recorded(state, batch):
            if next(calls) == 0:
                self.first_digests.append(combine_digests(array_digests(state)))
            self.num_packed += int((np.asarray(batch["segment_ids"]).max(1) > 1).sum())
            digest = hashlib.sha256()
            for name in sorted(batch):
                digest.update(np.asarray(batch[name]).tobytes())
            self.batches.append((int(batch["cursor"]), digest.hexdigest()))
            if len(self.batches) == self.last_step:
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch)

        return recorded

    def run(self, config, workdir, last_step):
        self.last_step = last_step
        if last_step == config.total_steps:
            self.last_step = None
            entry_point.pretrain(config, str(workdir))
            return
        with pytest.raises(SystemExit) as left:
            entry_point.pretrain(config, str(workdir))
        assert left.value.code == 75


@pytest.mark.slow
def test_a_run_goes_on_over_changing_devices(tmp_path, monkeypatch):
    config = make_config(tmp_path)

    def start(workdir, recorder, last_step, num_devices, mesh):
        devices = jax.devices()[:num_devices]
        monkeypatch.setattr(entry_point, "make_mesh", lambda mesh: make_mesh(mesh, devices))
        recorder.run(dataclasses.replace(config, mesh=mesh), workdir, last_step)

    with monkeypatch.context() as patch:
        unbroken = Recorder(patch)
        start(tmp_path / "unbroken", unbroken, TOTAL_STEPS, 1, ONE)
    changing = Recorder(monkeypatch)
    for last_step, (num_devices, mesh) in STARTS.items():
        start(tmp_path / "changing", changing, last_step, num_devices, mesh)

    # To the bit: what a start saved is what the next one, on other devices, began with.
    ledger = read_ledger(tmp_path / "changing")
    assert [row["step"] for row in ledger] == list(STARTS)
    assert changing.first_digests[1:] == [row["state_digest"] for row in ledger[:-1]]
    assert changing.first_digests[0] == unbroken.first_digests[0]

    assert changing.batches == unbroken.batches
    assert [cursor for cursor, _ in unbroken.batches] == list(range(8, 8 * TOTAL_STEPS + 1, 8))
    assert len({digest for _, digest in unbroken.batches}) == TOTAL_STEPS
    assert unbroken.num_packed  # rows of several texts: packing is at work

    rows = [read_metrics(tmp_path / name) for name in ("changing", "unbroken")]
    assert [row["step"] for row in rows[0]] == list(range(1, TOTAL_STEPS + 1))
    losses = [[row["train/loss"] for row in of_run] for of_run in rows]
    np.testing.assert_allclose(*losses, rtol=1e-5)
