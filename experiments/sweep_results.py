"""How the members of a sweep stand, read from their workdirs: states, metrics, rungs."""

import difflib
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from configs.schema import SweepConfig
from experiments.sweep_members import SweepMember
from llm.data.disk import read_json_object
from llm.evaluation.figures import MetricRows
from llm.launch.halving import badness, keep_best
from llm.launch.jobs import GO_ON, describe_exit, has_reached, read_starts, tail
from llm.training.files import write_atomically
from llm.training.metrics import read_metrics

_RUNGS = "rungs.json"


class Result(NamedTuple):
    """How a member stands."""

    member: SweepMember
    state: str  # done, stopped at step …, failed: …, not finished
    value: float | None  # of the sweep's metric, its last
    step: int | None  # at which it was measured
    seconds: float  # of all its starts, where they are recorded
    rows: MetricRows  # of metrics.jsonl
    tail: str  # of what it printed, where it failed


class UnknownMetricError(ValueError):
    """No member has logged what the sweep compares them by."""


def value_at(rows: MetricRows, metric: str, step: int | None = None) -> tuple[int | None, Any]:
    """Return the last step up to `step` at which the metric was logged, and its value there."""
    found = [row for row in rows if metric in row and (step is None or row["step"] <= step)]
    return (int(found[-1]["step"]), found[-1][metric]) if found else (None, None)


def read_results(
    workdir: epath.Path,
    sweep: SweepConfig,
    members: Sequence[SweepMember],
    failed: Mapping[str, str] = types.MappingProxyType({}),
) -> list[Result]:
    """Return how all members stand, the best first, those without the metric last; `failed` are
    those of which an executor alone knows it, and how."""
    decided = read_rungs(workdir)
    found = [
        _result(workdir / member.name, sweep, member, decided, failed.get(member.name))
        for member in members
    ]
    smallest = sweep.goal == "min"
    return sorted(found, key=lambda r: (r.state != "done", badness(r.value, smallest=smallest)))


def _result(
    folder: epath.Path,
    sweep: SweepConfig,
    member: SweepMember,
    decided: Sequence[Mapping],
    told: str | None,
) -> Result:
    rows, starts = read_metrics(folder), read_starts(folder)
    step, value = value_at(rows, sweep.metric)
    ended = next((rung for rung in decided if member.name in rung["ended"]), None)
    failed = starts and starts[-1]["exit_code"] not in (0, *GO_ON)
    if has_reached(folder):
        state = "done"
    elif failed:
        state = f"failed: {describe_exit(starts[-1]['exit_code'])}"
    elif told is not None:
        state = f"failed: {told}"
    elif ended is not None:
        state = f"stopped at step {ended['step']}"
    else:
        state = "not finished"
    seconds = math.fsum(start["seconds"] for start in starts)
    return Result(member, state, value, step, seconds, rows, tail(folder) if failed else "")


def check_metric(results: Sequence[Result], metric: str) -> None:
    """Raise where members have logged metrics and none of them the one asked for.

    Raises:
      UnknownMetricError: names the nearest ones that there are.
    """
    known = {name for result in results for row in result.rows for name in row} - {"step"}
    if known and metric not in known:
        near = difflib.get_close_matches(metric, sorted(known), n=4, cutoff=0.3)
        names = ", ".join(near or sorted(known)[:8])
        raise UnknownMetricError(f"no member has logged metric={metric!r}; there are {names}")


# -------------------------------------------------------------------------------- rungs


def read_rungs(workdir: epath.Path) -> list[dict[str, Any]]:
    """Return the rungs that are decided: step, values by member, who went on and who ended."""
    file = workdir / _RUNGS
    return read_json_object(file)["rungs"] if file.exists() else []


def decide(
    workdir: epath.Path, sweep: SweepConfig, alive: Sequence[SweepMember], step: int
) -> list[SweepMember]:
    """Return who goes on from a rung, as it was decided before, or now, and remember it.

    A rung is decided again where other members come to it: the sweep was changed.

    Raises:
      UnknownMetricError: no member has the metric at that step.
    """
    names = [member.name for member in alive]
    decided = read_rungs(workdir)
    rung = next((each for each in decided if each["step"] == step), None)
    if rung is None or sorted(rung["values"]) != sorted(names):
        values = {name: _value_at_rung(workdir / name, sweep.metric, step) for name in names}
        if not any(value is not None for value in values.values()):
            raise UnknownMetricError(
                f"no member has logged metric={sweep.metric!r} up to step {step}: evaluate or log "
                "at the rungs, or see what the members printed"
            )
        best = keep_best(values, sweep.halving.factor, smallest=sweep.goal == "min")
        ended = [name for name in names if name not in best]
        shown = {
            name: None if x is None or not math.isfinite(x) else x for name, x in values.items()
        }
        rung = {"step": step, "values": shown, "kept": best, "ended": ended}
        earlier = [each for each in decided if each["step"] < step]
        write_atomically(workdir / _RUNGS, json.dumps({"rungs": [*earlier, rung]}, indent=1))
    return [member for member in alive if member.name in rung["kept"]]


def _value_at_rung(folder: epath.Path, metric: str, step: int) -> float | None:
    """Return a member's metric at a rung; None where it has not come so far."""
    reached = has_reached(folder, step)
    return value_at(read_metrics(folder), metric, step)[1] if reached else None


def forget_rungs(workdir: epath.Path) -> None:
    """Forget what was decided: the sweep has no rungs any more."""
    (workdir / _RUNGS).unlink(missing_ok=True)
