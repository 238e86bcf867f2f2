"""Real processes on one machine, joined over loopback, train what one process trains.

Each has one device and loads only its share of the data. In pretraining losses are compared to
1e-5 of themselves and parameters to 1e-4, in later stages all that is logged to 1e-3: float32 sums
depend on their order, which devices share out.
"""

import json

import numpy as np
import pytest

from llm.training.loading import load_params, verify
from llm.training.metrics import read_metrics
from tests.faults.harness import finish, make_life, process_flags, start, start_together

TOTAL_STEPS = 6
MODEL = (
    "--config.model.num_layers=2",
    "--config.model.num_heads=4",
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=16",
)
FLAGS = (*MODEL, f"--config.total_steps={TOTAL_STEPS}", "--config.data.batch_sequences=8")
# Says which rows a process has loaded, when it ends.
COUNT_ROWS = """
import atexit, json, llm.data.loader as l
real, rows = l.Batches.__next__, []
def count(self):
    batch = real(self)
    rows.append(batch["tokens"].tolist())
    return batch
l.Batches.__next__ = count
atexit.register(lambda: open({path!r}, "w").write(json.dumps(rows)))
"""
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    make_life(folder, {"pretrain": FLAGS})
    return folder


def train(folder, workdir, num_processes, *mesh):
    """Train with so many processes; return the rows that each has loaded."""
    paths = [workdir.parent / f"{workdir.name}-rows-{index}.json" for index in range(num_processes)]
    patches = [COUNT_ROWS.format(path=str(path)) for path in paths]
    flags = (f"--config.mesh.{axis}" for axis in mesh)
    processes = start_together("pretrain", folder, workdir, *FLAGS, *flags, patches=patches)
    for process in processes:
        finish(process)
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize(
    ("num_processes", "mesh", "shares"),
    [
        (2, ("data=1", "tensor=2"), 1),
        (2, ("fsdp=2",), 2),
        (2, ("data=1", "pipeline=2"), 2),
        (4, ("data=1", "fsdp=2", "context=2"), 2),
        (4, ("data=2", "tensor=2"), 2),
    ],
)
def test_processes_train_what_one_trains(folder, tmp_path, num_processes, mesh, shares):
    workdir = tmp_path / "run"
    loaded = train(folder, workdir, num_processes, *mesh)
    assert {len(batch) for rows in loaded for batch in rows} == {8 // shares}
    parts = {json.dumps(rows[0]) for rows in loaded}
    assert len(parts) == shares  # the others hold the same rows, and load the same

    ours, alone = (read_metrics(run) for run in (workdir, folder / "pretrain"))
    assert [row["step"] for row in ours] == list(range(1, TOTAL_STEPS + 1))
    losses = [[row["train/loss"] for row in run] for run in (ours, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert all(report.problems == () for report in verify(workdir))
    ours, alone = (load_params(run, TOTAL_STEPS).params for run in (workdir, folder / "pretrain"))
    for path in (("embedder", "embedding"), ("head", "kernel")):
        one, other = (tree[path[0]][path[1]] for tree in (ours, alone))
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_another_config_is_named_by_all_and_nothing_is_trained(folder, tmp_path):
    """Half of the parameters would come from one seed, half from the other."""
    workdir, seeds = tmp_path / "run", ("--config.seed=1", "--config.seed=2")
    both = [
        start("pretrain", folder, workdir, *FLAGS, *own)
        for own in zip(process_flags(2), seeds, strict=True)
    ]
    for process in both:
        assert "differ in config.seed (2, 1)" in finish(process, expect=2)
    assert not workdir.exists()


def test_two_processes_learn_from_feedback_as_one_does(tmp_path):
    """All that is logged but clocks: means over all responses, whichever process scored them."""
    stages = {"pretrain": FLAGS, "finetune": (), "reward": (), "preference": (), "rlhf": ()}
    make_life(tmp_path, stages)
    for stage in ("finetune", "reward", "preference", "rlhf"):
        workdir = tmp_path / f"{stage}-of-two"
        mesh = "--config.mesh.data=1", "--config.mesh.fsdp=2"
        for process in start_together(stage, tmp_path, workdir, *mesh):
            finish(process)
        ours, alone = (read_metrics(run) for run in (workdir, tmp_path / stage))
        assert len(ours) == len(alone) > 0
        for one, other in zip(ours, alone, strict=True):
            assert one.keys() == other.keys()
            for name in (name for name in one if not name.startswith("perf/")):
                expected = pytest.approx(other[name], rel=1e-3, abs=1e-5, nan_ok=True)
                assert one[name] == expected, (stage, name, one["step"])
