"""Members of a sweep before anything runs: names, checks, records, cost, and whom a rung keeps."""

import dataclasses
import json

import pytest
from etils import epath

from configs.command_line import as_override, load_config
from configs.dataclass_config import ConfigError, paths_below
from configs.schema import PretrainConfig, SweepConfig
from configs.sweep_space import grid, listed
from experiments.sweep import job_of, run_members
from experiments.sweep_cost import cost_of, listing, total_with_halving
from experiments.sweep_members import name_of, record_sweep, resolve, varying_fields
from experiments.sweep_results import UnknownMetricError, read_results, read_rungs
from llm.launch.config import CostConfig, HalvingConfig
from llm.launch.jobs import is_done, record_start
from llm.training.files import append_json_line
from llm.training.run_config import ConfigChangedError, record_config

RECIPE = "configs/pretrain_tiny.py"
RATES = grid({"optimizer.learning_rate": [0.01, 0.02, 0.04]})


def sweep_of(members=RATES, **fields):
    return SweepConfig(recipe=RECIPE, members=members, metric="loss", **fields)


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "base"),
        ({"optimizer.learning_rate": 1e-3, "seed": 1}, "learning_rate=0.001,seed=1"),
        ({"seed": 1, "optimizer.learning_rate": 1e-3}, "learning_rate=0.001,seed=1"),
        ({"data.seed": 1}, "data.seed=1"),  # not `seed`, which is another field
        # a member of a mapping is in no class: it keeps its path
        ({"data.sources.reviews.name": "x"}, "data.sources.reviews.name=x"),
        ({"model.head_dim": None}, "head_dim=None"),
    ],
)
def test_names_are_short_and_tell_fields_apart(fields, name):
    assert name_of(fields, list(paths_below(PretrainConfig))) == name


def test_long_and_strange_names_are_cut_and_stay_different():
    paths = list(paths_below(PretrainConfig))
    fields = [{"evaluation.prompts": (f"{'a long way / home ' * 9}{i}",)} for i in range(3)]
    names = [name_of(each, paths) for each in fields]
    assert len(set(names)) == 3 and all(len(name) <= 72 and "/" not in name for name in names)
    assert names == [name_of(each, paths) for each in fields]


@pytest.mark.parametrize(
    "value", [True, None, 3, 1e-5, 0.1, "muon", ("a", "b,c"), (1, 2), {"paths": ("a b",)}]
)
def test_what_is_typed_for_a_value_gives_the_value_back(value):
    field = {
        bool: "run.allow_data_change", type(None): "evaluation.max_sequences", int: "total_steps",
        float: "optimizer.learning_rate", str: "optimizer.name", dict: "data.sources.more",
    }.get(type(value), "evaluation.prompts")  # fmt: skip
    if value == (1, 2):
        value = ("1", "2")
    found = load_config(RECIPE, [as_override(field, value)], PretrainConfig)
    for part in field.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    if isinstance(value, dict):
        assert found.paths == value["paths"]
    else:
        assert found == value and type(found) is type(value)


# ------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"optimizer.lerning_rate": 1},
            r"members\[1\]: config.optimizer has no field 'lerning_rate'; did you mean",
        ),
        ({"learning_rate": 1}, "did you mean config.optimizer.learning_rate"),
        ({"optimizer.name": "mouon"}, "must be one of .*; did you mean muon"),
        ({"total_steps": "many"}, "config.total_steps must be int or none"),
        ({"accumulate_steps": 3}, "data.batch_sequences=16 is not a multiple of"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_the_member(fields, said):
    with pytest.raises(ConfigError, match=said):
        resolve(sweep_of(listed({"seed": 1}, fields)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": ""}, "recipe is empty"),
        ({"members": ()}, "members is empty"),
        ({"members": ("seed",)}, "members has 'seed': each is a dict"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        SweepConfig(**{"recipe": RECIPE, "members": RATES} | given)


def test_equal_members_run_once_and_shared_fields_show_in_no_name():
    sweep = sweep_of((*RATES, *RATES[:1]), shared=listed({"total_steps": 7}))
    members = resolve(sweep)
    assert "3 members (1 more repeat them)" in listing(sweep, members).splitlines()
    assert [member.name for member in members] == [f"learning_rate={x}" for x in (0.01, 0.02, 0.04)]
    assert all(member.config.total_steps == 7 == member.total_steps for member in members)
    assert varying_fields(members) == ["optimizer.learning_rate"]


# ------------------------------------------------------------------------------ records


def test_a_member_may_have_a_recipe_of_its_own(tmp_path):
    recipes = grid({"recipe": ["configs/depth.py:2", "configs/depth.py:4"], "seed": [1]})
    sweep = sweep_of(recipes + listed({"seed": 1}), executor="skypilot")
    members = resolve(sweep)
    assert [m.config.model.num_layers for m in members] == [2, 4, 2]
    assert [m.recipe for m in members] == ["configs/depth.py:2", "configs/depth.py:4", RECIPE]
    assert len({member.name for member in members}) == 3
    command = job_of(sweep, members[1], epath.Path("gs://bucket/sweep")).command
    assert command[3] == "--config=configs/depth.py:4" and not any(
        "recipe=" in c for c in command[5:]
    )
    record_sweep(epath.Path(tmp_path), sweep, members)
    kept = json.loads((tmp_path / members[1].name / "member.json").read_text())
    assert kept["recipe"] == "configs/depth.py:4" and list(kept["difference"]) == ["seed"]
    with pytest.raises(FileNotFoundError, match="no recipe 'configs/dept.py'; did you mean"):
        resolve(sweep_of(listed({"recipe": "configs/dept.py"})))


def test_a_workdir_keeps_what_a_member_differs_in(tmp_path):
    sweep = sweep_of(shared=listed({"total_steps": 7}))
    workdir = epath.Path(tmp_path)
    assert record_sweep(workdir, sweep, resolve(sweep)) == "3 members"
    kept = json.loads((tmp_path / "learning_rate=0.04" / "member.json").read_text())
    assert kept["fields"] == {"optimizer.learning_rate": 0.04}
    assert kept["difference"] == {
        "optimizer.learning_rate": {"recipe": 0.02, "member": 0.04},
        "total_steps": {"recipe": 300, "member": 7},
    }
    other = sweep_of(RATES[1:] + listed({"seed": 3}), shared=sweep.shared)
    assert record_sweep(workdir, other, resolve(other)).splitlines() == [
        "3 members",
        "1 new since the last start: seed=3",
        "1 no longer in the sweep, their directories stay: learning_rate=0.01",
    ]


def test_a_member_whose_config_has_changed_is_refused_at_once(tmp_path):
    sweep = sweep_of()
    first = resolve(sweep)[0]
    (tmp_path / first.name).mkdir()
    record_config(tmp_path / first.name, dataclasses.asdict(first.config), {})
    longer = sweep_of(shared=listed({"total_steps": 9}))
    with pytest.raises(ConfigChangedError, match="total_steps: 300 → 9"):
        record_sweep(epath.Path(tmp_path), longer, resolve(longer))


# --------------------------------------------------------------------------------- cost


def test_cost_is_flops_over_the_rate_and_hours_times_the_price():
    sweep = sweep_of(
        shared=listed({"total_steps": 100}),
        cost=CostConfig(flops_per_second=1e9, price_per_hour=36.0),
    )
    members = resolve(sweep)
    cost = cost_of(sweep, members[0])
    # Two layers, 128 wide: 12·L·D² and the head's V·D parameters, six FLOPs each for each of 2,048
    # tokens a step, and 6·L·D·T of causal attention; norms are the rest.
    a_token = 6 * (12 * 2 * 128**2 + 1024 * 128) + 6 * 2 * 128 * 128
    assert cost.flops == pytest.approx(100 * 2048 * a_token, rel=0.005)
    assert cost.hours == pytest.approx(cost.flops / 3.6e12)
    assert cost.price == pytest.approx(cost.flops / 1e11)
    halved = dataclasses.replace(sweep, halving=HalvingConfig(at_steps=(10, 40), factor=2))
    # 3 members to step 10, 2 to 40, 1 to 100
    steps = 3 * 10 + 2 * 30 + 1 * 60
    most = total_with_halving(halved, members, [cost_of(halved, m) for m in members])
    assert most.flops == pytest.approx(cost.flops / 100 * steps)
    shown = listing(halved, members).splitlines()
    assert shown[-1].startswith("at most, with halving") and f"{most.price:,.2f}" in shown[-1]
    assert "no hours: cost.flops_per_second is not set" in listing(sweep_of(), members)


# ------------------------------------------------------------------------------ halving


class ClosedForm:
    """An executor whose runs have loss(rate, step) = (rate - 0.02)² + 1/step, logged each step.

    In the order given, or the reverse of it; some break at a step.
    """

    def __init__(self, *, breaks=None, backwards=False, at_most=10**9):
        self.breaks, self.backwards, self.at_most = breaks or {}, backwards, at_most
        self.steps_taken = 0

    def run(self, jobs):
        for job in reversed(jobs) if self.backwards else jobs:
            if not self.at_most:
                return False
            if not is_done(job):
                self.at_most -= 1
                record_start(job, self._train(job), 1.0)
        return True

    def _train(self, job):
        job.folder.mkdir(parents=True, exist_ok=True)
        rate = float(job.name.partition("=")[2])
        log = job.folder / "metrics.jsonl"
        begin = len(log.read_text().splitlines()) if log.exists() else 0
        for step in range(begin + 1, (job.stop_at_step or 60) + 1):
            if step == self.breaks.get(rate):
                return 1
            self.steps_taken += 1
            append_json_line(log, {"step": step, "loss": (rate - 0.02) ** 2 + 1 / step})
        return 0


NINE = grid({"optimizer.learning_rate": [0.012, 0.018, 0.022, 0.03, 0.04, 0.021, 0.05, 0.06, 0.08]})


def halved(members=NINE, **fields):
    halving = HalvingConfig(at_steps=(5, 20), factor=3)
    return sweep_of(members, halving=halving, shared=listed({"total_steps": 60}), **fields)


def run(workdir, sweep, executor):
    members = resolve(sweep)
    over = run_members(sweep, members, workdir, executor)
    return over, read_results(workdir, sweep, members)


def test_the_known_best_survives_and_no_step_is_taken_twice(tmp_path):
    executor = ClosedForm()
    over, results = run(epath.Path(tmp_path), halved(), executor)
    assert over and executor.steps_taken == 9 * 5 + 3 * 15 + 1 * 40
    assert [rung["kept"] for rung in read_rungs(epath.Path(tmp_path))] == [
        ["learning_rate=0.021", "learning_rate=0.018", "learning_rate=0.022"],
        ["learning_rate=0.021"],
    ]
    assert (results[0].member.name, results[0].state) == ("learning_rate=0.021", "done")
    assert results[0].value == pytest.approx(0.001**2 + 1 / 60) and results[0].step == 60
    states = [result.state for result in results[1:]]
    assert states.count("stopped at step 20") == 2 and states.count("stopped at step 5") == 6
    assert executor.run([]) and run(epath.Path(tmp_path), halved(), executor)[0]
    assert executor.steps_taken == 9 * 5 + 3 * 15 + 1 * 40  # all is done


@pytest.mark.parametrize("after", [1, 4, 9, 11, 12])
def test_it_holds_under_interruption_and_whatever_the_order(tmp_path, after):
    whole = run(epath.Path(tmp_path / "whole"), halved(), ClosedForm())[1]
    parts = epath.Path(tmp_path / "parts")
    over, _ = run(parts, halved(), ClosedForm(at_most=after, backwards=True))
    assert not over
    _, results = run(parts, halved(), ClosedForm())
    assert read_rungs(parts) == read_rungs(epath.Path(tmp_path / "whole"))
    told = [(result.member.name, result.state, result.value) for result in results]
    assert told == [(result.member.name, result.state, result.value) for result in whole]


def test_a_member_that_broke_before_the_rung_is_out_however_good_it_was(tmp_path):
    breaks = {0.021: 5, 0.018: 3}
    _, results = run(epath.Path(tmp_path), halved(), ClosedForm(breaks=breaks))
    assert results[0].member.name == "learning_rate=0.022"
    failed = {r.member.name for r in results if r.state == "failed: a bug (exit code 1)"}
    assert failed == {"learning_rate=0.021", "learning_rate=0.018"}
    # mended since: what was decided stays
    _, later = run(epath.Path(tmp_path), halved(), ClosedForm())
    assert later[0].member.name == "learning_rate=0.022" and later[0].state == "done"


def test_new_members_bring_a_rung_to_be_decided_again(tmp_path):
    run(epath.Path(tmp_path), halved(), ClosedForm())
    executor = ClosedForm()
    more = halved(NINE + listed({"optimizer.learning_rate": 0.02}))
    _, results = run(epath.Path(tmp_path), more, executor)
    assert results[0].member.name == "learning_rate=0.02"
    # of ten members four go on, and two of them; only the new one has steps to take
    assert [len(rung["kept"]) for rung in read_rungs(epath.Path(tmp_path))] == [4, 2]
    assert executor.steps_taken == 5 + 15 + 40


def test_a_metric_that_nobody_logs_is_named(tmp_path):
    with pytest.raises(UnknownMetricError, match="metric='eval/loss' up to step 5"):
        run(epath.Path(tmp_path), dataclasses.replace(halved(), metric="eval/loss"), ClosedForm())


def test_a_members_command_is_what_a_person_would_type(tmp_path):
    sweep = sweep_of(shared=listed({"seed": 3}))
    member = resolve(sweep)[0]
    job = job_of(sweep, member, epath.Path(tmp_path), 40)
    assert job.command[1:3] == ("-m", "experiments.pretrain")
    assert job.command[4:] == (
        f"--workdir={tmp_path}/learning_rate=0.01",
        "--config.seed=3",
        "--config.optimizer.learning_rate=0.01",
        "--config.run.stop_at_step=40",
        "--process=alone",
    )
    cloud = dataclasses.replace(sweep, executor="skypilot")
    bucket = epath.Path("gs://bucket/sweep")
    assert job_of(cloud, member, bucket).command == (
        *("python", "-m", "experiments.pretrain", f"--config={RECIPE}"),
        "--workdir=gs://bucket/sweep/learning_rate=0.01",
        *("--config.seed=3", "--config.optimizer.learning_rate=0.01"),
    )
