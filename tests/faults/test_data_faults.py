"""Data that change under a run: each example once, or a clear stop; never other data unasked."""

import json
import pathlib
import shutil

import pytest

from tests.faults.harness import finish, make_life, outcome, start

FLAGS = ("--config.total_steps=12", "--config.data.num_workers=1")

AT_STEP_FIVE = """
import os, pathlib
def fault():
{fault}
real_after_step = r.Run.after_step
def after_step(self, state, metrics):
    state = real_after_step(self, state, metrics)
    if self.step == 5: fault()
    return state
r.Run.after_step = after_step
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    make_life(folder, {"pretrain": FLAGS})
    return folder


def shard(folder) -> pathlib.Path:
    (found,) = (folder / "cache" / "prepared").glob("*/text/train/*.array_record")
    return found


def broken(folder, fault, workdir, *flags, expect):
    patch = AT_STEP_FIVE.format(fault=f"    {fault}")
    return " ".join(finish(start("pretrain", folder, workdir, *FLAGS, *flags, patch=patch),
                           expect=expect).split())  # fmt: skip


@pytest.mark.slow
def test_a_shard_overwritten_in_the_middle_of_a_run_stops_it(folder, tmp_path):
    path, good = shard(folder), shard(folder).read_bytes()
    fault = f"pathlib.Path({str(path)!r}).write_bytes(bytes({len(good)}))"
    said = broken(folder, fault, tmp_path / "run", expect=2)
    assert f"{path} is damaged" in said and "prepare it again" in said and "Traceback" not in said
    path.write_bytes(good)
    finish(start("pretrain", folder, tmp_path / "run", *FLAGS))
    assert outcome(tmp_path / "run") == outcome(folder / "pretrain")


@pytest.mark.slow
@pytest.mark.long
def test_a_shard_removed_in_the_middle_of_a_run_is_read_on_and_then_missed(folder, tmp_path):
    path, good = shard(folder), shard(folder).read_bytes()
    broken(folder, f"os.remove({str(path)!r})", tmp_path / "run", expect=0)
    assert outcome(tmp_path / "run") == outcome(folder / "pretrain")
    child = start("pretrain", folder, tmp_path / "again", *FLAGS)
    said = finish(child, expect=2)
    assert f"{path} is missing" in " ".join(said.split()) and "Traceback" not in said
    path.write_bytes(good)


@pytest.mark.slow
def test_a_source_replaced_is_noticed_at_the_resume(folder, tmp_path):
    path, run = folder / "text.jsonl", tmp_path / "run"
    before = path.read_text()
    shutil.copytree(folder / "pretrain", run)
    path.write_text(before.replace("sun", "son"))
    said = " ".join(finish(start("pretrain", folder, run, *FLAGS), expect=2).split())
    assert "was made with other data (text (train): " in said
    finish(start("pretrain", folder, run, *FLAGS, "--config.run.allow_data_change=True"))
    (row,) = map(json.loads, (run / "changes.jsonl").read_text().splitlines()[-1:])
    assert row["forced"] and "data: text (train)" in row["changes"]
    path.write_text(before)
