"""Workdirs from anywhere: whatever MANIFEST.json, the ledger and config.json say, and whoever made
their digests right, is one clear error, and nothing outside of the step's directory is read.

HYPOTHESIS_PROFILE=long searches longer (tests/conftest.py).
"""

import pathlib
import shutil

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_loop import toy_state

from experiments.entry import _is_users_mistake
from experiments.loading import is_workdir, load_model
from llm.training import manifests
from llm.training.checkpoints import Checkpointer, CheckpointError
from llm.training.files import canonical_json, text_digest
from llm.training.loading import load_params, verify
from llm.training.manifests import CHECKPOINTS, MANIFEST, CorruptStepError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4) | st.sampled_from(["../../secret", "/etc/passwd", "O", 2**70, -1]),
    lambda each: st.lists(each, max_size=3)
    | st.dictionaries(st.text(max_size=4), each, max_size=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved") / "workdir"
    checkpointer = Checkpointer(workdir)
    checkpointer.save(1, toy_state(), {"tokens": 10})
    checkpointer.close()
    (workdir.parent / "secret").write_text("secret")
    return epath.Path(workdir)


@pytest.fixture
def workdir(saved, tmp_path):
    return epath.Path(shutil.copytree(saved, tmp_path / "workdir"))


@pytest.fixture(scope="module", autouse=True)
def read_files(saved):
    """All that is hashed must lie in a step's directory."""
    patch = pytest.MonkeyPatch()

    def inside(path):
        step = pathlib.Path(path).resolve()
        assert CHECKPOINTS in step.parts, f"{path} was read"
        return real(path)

    real = manifests.file_digest
    patch.setattr(manifests, "file_digest", inside)
    yield
    patch.undo()


def content_of(workdir: epath.Path) -> dict:
    return manifests.read_manifest(workdir / CHECKPOINTS / "1")


def write(step: epath.Path, content: object) -> None:
    """Write a manifest with the digest that it should have."""
    whole = {"manifest": content, "sha256": text_digest(canonical_json(content))}
    (step / MANIFEST).write_text(canonical_json(whole))


def first(mapping: dict) -> str:
    return next(iter(mapping))


def change(content: dict, section: str, **facts) -> dict:
    """Return a manifest whose first file or array has other facts."""
    name = first(content[section])
    return content | {section: content[section] | {name: content[section][name] | facts}}


HOSTILE = {
    "no object": lambda c: [c],
    "no step": lambda c: {k: v for k, v in c.items() if k != "step"},
    "a step that is text": lambda c: c | {"step": "1"},
    "tokens that are text": lambda c: c | {"tokens": "many"},
    "no files": lambda c: c | {"files": None},
    "files as a list": lambda c: c | {"files": list(c["files"])},
    "a file above": lambda c: c | {"files": {"../../../secret": {"bytes": 6, "sha256": ""}}},
    "a file deep above": lambda c: c | {"files": {"d/../../x": {"bytes": 6, "sha256": ""}}},
    "an absolute file": lambda c: c | {"files": {"/etc/passwd": {"bytes": 6, "sha256": ""}}},
    "a file of another store": lambda c: c | {"files": {"gs://b/x": {"bytes": 6, "sha256": ""}}},
    "a file without a name": lambda c: c | {"files": {"": {"bytes": 6, "sha256": ""}}},
    "a file with a zero byte": lambda c: c | {"files": {"a\0b": {"bytes": 6, "sha256": ""}}},
    "a file of no size": lambda c: change(c, "files", bytes=None),
    "a file of no digest": lambda c: change(c, "files", sha256=1),
    "arrays as text": lambda c: c | {"arrays": "params"},
    "a shape that is text": lambda c: change(c, "arrays", shape="16"),
    "a shape below zero": lambda c: change(c, "arrays", shape=[-1, 4]),
    "a shape of 2^80 numbers": lambda c: change(c, "arrays", shape=[2**40, 2**40]),
    "a shape of 99 axes": lambda c: change(c, "arrays", shape=[1] * 99),
    "an unknown type": lambda c: change(c, "arrays", dtype="float33"),
    "a type of objects": lambda c: change(c, "arrays", dtype="O"),
    "an array in an array": lambda c: (
        c | {"arrays": {f"{first(c['arrays'])}/x": c["arrays"][first(c["arrays"])]} | c["arrays"]}
    ),
    "an array that is not there": lambda c: (
        c | {"arrays": {"params/other": c["arrays"][first(c["arrays"])]} | c["arrays"]}
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_manifest_with_a_right_digest(workdir, kind):
    write(workdir / CHECKPOINTS / "1", HOSTILE[kind](content_of(workdir)))
    report = verify(workdir)[0]
    assert report.problems
    with pytest.raises(CorruptStepError, match="no good checkpoint to load: step 1"):
        load_params(workdir)
    if kind != "an array that is not there":  # that is another state than the run's
        checkpointer = Checkpointer(workdir)
        with pytest.raises(CheckpointError, match="none of them is good"):
            checkpointer.restore(toy_state())
        checkpointer.close()


@settings(max_examples=100 if settings().derandomize else 3000)
@given(st.sampled_from(["", "step", "tokens", "files", "arrays", "a file", "an array"]), JSON,
       st.sampled_from(["shape", "dtype", "digest", "bytes", "sha256"]))  # fmt: skip
def test_a_manifest_of_any_content(saved, place, value, fact):
    step, content = saved / CHECKPOINTS / "1", content_of(saved)
    match place:
        case "":
            changed = value
        case "a file" | "an array":
            changed = change(content, "files" if place == "a file" else "arrays", **{fact: value})
        case _:
            changed = content | {place: value}
    try:
        write(step, changed)
        try:
            load_params(saved)
        except Exception as error:
            assert _is_users_mistake(error), repr(error)
            assert str(saved) in str(error) or "step" in str(error)
        verify(saved)
    finally:
        write(step, content)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[" * 5000, b"null", b'{"manifest": 1}', b'{"manifest": NaN}', b"\0"]
)
def test_a_manifest_of_any_bytes(workdir, text):
    (workdir / CHECKPOINTS / "1" / MANIFEST).write_bytes(text)
    with pytest.raises(CorruptStepError, match="no good checkpoint to load: step 1: MANIFEST.json"):
        load_params(workdir)
    assert verify(workdir)[0].problems


def test_a_ledger_of_any_rows(workdir):
    rows = [b'{"step": []}', b'{"step": "1"}', b"[" * 5000, b"\xff", b'{"step": 1}', b"{", b"7"]
    (workdir / "checkpoints.jsonl").write_bytes(b"\n".join(rows))
    assert load_params(workdir).step == 1
    assert verify(workdir)[0].problems  # it disagrees with the manifest


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff", b"[]", b"7", b"null", b"[" * 5000, b"{}", b'{"model": 1}', b'{"model": []}',
        b'{"model": {"width": "a"}}', b'{"model": {"num_layers": 1e400}}', b'{"model": {"x": 1}}',
        b'{"model": {"num_layers": 100000000000000}}', b'{"model": {}, "adapter": 3}',
        b'{"model": {"vocab_size": 3}}',
    ],
)  # fmt: skip
def test_a_config_of_any_content(workdir, text):
    (workdir / "config.json").write_bytes(text)
    assert is_workdir(workdir)
    with pytest.raises(Exception) as caught:
        load_model(str(workdir))
    assert _is_users_mistake(caught.value), repr(caught.value)
    assert str(workdir) in str(caught.value)
