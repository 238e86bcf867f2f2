"""A resume by other code, with other libraries or of other data is refused, unless allowed."""

import json

import pytest

from llm.training import identity
from llm.training.identity import IdentityChangedError, code_of
from llm.training.run import Run
from llm.training.run_config import RunConfig

LOOP = """
from llm.tools import helper


def train():
    "Train."
    return helper(2)
"""
HELPER = """
def helper(x):
    # doubles
    return 2 * x
"""


@pytest.fixture
def house(tmp_path):
    """A repository with a loop and what it imports."""
    for name, text in (
        ("experiments/loop.py", LOOP),
        ("llm/tools.py", HELPER),
        ("llm/other.py", "x = 1\n"),
    ):
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").write_text("")
        path.write_text(text)
    yield tmp_path / "house"
    identity._source.cache_clear()


def start(workdir, house, data=None, **options):
    identity._source.cache_clear()  # a new process
    run = Run(
        workdir, {}, RunConfig(**options), total_steps=1, tokens_per_step=1,
        code=str(house / "experiments" / "loop.py"),
    )  # fmt: skip
    with run:
        run.check_data(data or {})


def test_the_code_is_the_loop_and_all_that_it_imports(house):
    names = list(code_of(str(house / "experiments" / "loop.py")))
    assert names == ["experiments/loop.py", "llm/tools.py"]


def test_comments_and_docstrings_may_change(tmp_path, house):
    start(tmp_path / "run", house)
    (house / "llm/tools.py").write_text(HELPER.replace("# doubles", "# twice x"))
    (house / "experiments/loop.py").write_text(LOOP.replace('"Train."', '"Train the model."'))
    (house / "llm/other.py").write_text("x = 2\n")
    start(tmp_path / "run", house)
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_changed_code_is_refused_with_its_first_line_and_recorded_when_allowed(tmp_path, house):
    start(tmp_path / "run", house)
    (house / "llm/tools.py").write_text(HELPER.replace("2 * x", "3 * x"))
    with pytest.raises(
        IdentityChangedError,
        match=r"other code \(llm/tools.py: - return 2 \* x \+ return 3 \* x\).*allow_code_change",
    ):
        start(tmp_path / "run", house)
    start(tmp_path / "run", house, allow_code_change=True)
    (row,) = map(json.loads, (tmp_path / "run" / "changes.jsonl").read_text().splitlines())
    assert row["forced"] and list(row["changes"]) == ["code: llm/tools.py"]
    start(tmp_path / "run", house)  # the run is made of it now
    assert len(list((tmp_path / "run" / "identity").glob("code-*.zip"))) == 2


def test_other_libraries_are_refused(tmp_path, house, monkeypatch):
    start(tmp_path / "run", house)
    real = identity.library_versions()
    monkeypatch.setattr(identity, "library_versions", lambda: real | {"jax": "0.0.1"})
    with pytest.raises(IdentityChangedError, match=rf"jax: {real['jax']} → 0.0.1"):
        start(tmp_path / "run", house)


def test_what_is_edited_while_the_process_runs_does_not_count(tmp_path, house):
    """It has its modules in memory: those are what it runs and what it records."""
    first = code_of(str(house / "experiments" / "loop.py"))
    (house / "llm/tools.py").write_text(HELPER.replace("2 * x", "3 * x"))
    assert code_of(str(house / "experiments" / "loop.py")) == first


def test_other_data_is_refused(tmp_path, house):
    start(tmp_path / "run", house, {"text (train)": "a" * 64, "tokenizer": "t"})
    start(tmp_path / "run", house, {"text (train)": "a" * 64, "tokenizer": "t"})
    with pytest.raises(IdentityChangedError, match=r"text \(train\): aaaaaaaaaaaa… → bbb.*allow_d"):
        start(tmp_path / "run", house, {"text (train)": "b" * 64, "tokenizer": "t"})
    with pytest.raises(IdentityChangedError, match="tokenizer: t → absent"):
        start(tmp_path / "run", house, {"text (train)": "a" * 64})
    start(tmp_path / "run", house, {"text (train)": "b" * 64}, allow_data_change=True)
    (row,) = map(json.loads, (tmp_path / "run" / "changes.jsonl").read_text().splitlines())
    assert list(row["changes"]) == ["data: text (train)", "data: tokenizer"]


def test_a_damaged_record_is_named(tmp_path, house):
    start(tmp_path / "run", house)
    (tmp_path / "run" / "identity" / "code.json").write_text("{")
    with pytest.raises(ValueError, match="code.json is not JSON"):
        start(tmp_path / "run", house)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "reward", "scaling"])
def test_a_run_is_not_disturbed_by_what_another_stage_computes(stage):
    """The code of a run is what it imports: no policy gradients here."""
    names = code_of(f"experiments/{stage}.py")
    assert "llm/training/step.py" in names
    assert not {f"llm/rl/{name}.py" for name in ("learning", "loss", "rollout")} & set(names)
