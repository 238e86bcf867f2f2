"""How often a run logs and saves, and which config a workdir belongs to. Importing it needs no JAX.
A workdir keeps one config; a resume with another one is refused with the difference shown."""

import dataclasses
import datetime
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from llm.parallel.checks import check_ranges
from llm.training.files import (
    absolute,
    append_json_line,
    canonical_json,
    text_digest,
    write_atomically,
)

CONFIG = "config.json"
CHANGES = "changes.jsonl"

# What may differ at a resume without asking: it changes neither the batches nor the update. (The
# mesh changes only the order of sums; everything below `run` is the class RunConfig.)
FREE_KEYS = ("run", "evaluation", "mesh", "data.num_workers", "data.cache_dir")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Logging, saving and stopping. Nothing here changes what is learnt."""

    log_every_steps: int = 10
    save_every_steps: int = 1000  # 0: only at the end and when asked to stop
    save_every_seconds: float | None = None  # as well; on a single process
    stop_at_step: int = 0  # end here, for now: with a later one the run goes on; 0: at its end
    keep_newest_checkpoints: int = 3
    keep_every_steps: int = 0  # checkpoints at its multiples stay for ever; 0: none do
    # A full disk: warn, train on, try again when a save is due. On a single process.
    go_on_after_failed_save: bool = False
    max_skipped_in_a_row: int = 10  # steps without a finite gradient before the run gives up
    hang_timeout_seconds: float = 600.0  # of several processes: of a step; then the run ends (76)
    replay_every_steps: int = 0  # take a step twice and compare the bits; 0: never
    profile_start_step: int = 10  # of this process: past compilation and the first steps
    profile_num_steps: int = 0  # 0: no profile; else a trace is written to workdir/profile
    # Resume a workdir of another config, other code or libraries, other data; recorded in it.
    allow_config_change: bool = False
    allow_code_change: bool = False
    allow_data_change: bool = False
    wandb_project: str = ""  # also log to Weights & Biases, when not empty
    # What `experiments.plan` reckons with, by the chip's name in llm/scaling/hardware.py: what you
    # pay, {"v5p": 4.2}. Prices change, and no table of them is kept here.
    chip_hour_dollars: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(
            self,
            section="run.",
            positive="save_every_seconds hang_timeout_seconds chip_hour_dollars",
            size="log_every_steps keep_newest_checkpoints max_skipped_in_a_row profile_start_step",
            count="save_every_steps keep_every_steps stop_at_step profile_num_steps "
            "replay_every_steps",
        )

    def check_processes(self, num_processes: int) -> None:
        """Raise where several processes would each decide for themselves, and part.

        Raises:
          ValueError: a field is for a single process only.
        """
        if num_processes > 1 and self.save_every_seconds is not None:
            raise ValueError(
                f"run.save_every_seconds={self.save_every_seconds}: the clocks of {num_processes} "
                "processes disagree; use run.save_every_steps"
            )
        if num_processes > 1 and self.go_on_after_failed_save:
            raise ValueError(
                f"run.go_on_after_failed_save: of {num_processes} processes one might go on and "
                "another not; leave it out"
            )


class ConfigChangedError(ValueError):
    """A workdir belongs to another config than the one given."""


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old value, new value)} of what differs; None stands for absent."""
    before, after = flatten(_as_json(old)), flatten(_as_json(new))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def config_digest(config: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits for a config, whatever the order of its keys."""
    return text_digest(canonical_json(_as_json(config)))[:16]


def check_config(
    workdir: epath.PathLike, config: Mapping[str, Any], *, allow_change: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Return how the config differs from that of the workdir: {} where there is none yet.

    Raises:
      ConfigChangedError: a key outside FREE_KEYS differs and no change is allowed.
      ValueError: the workdir's config.json cannot be read.
    """
    path = absolute(workdir) / CONFIG
    if not path.exists():
        _as_json(config)
        return {}
    try:
        stored = json.loads(path.read_text())
        difference = config_difference(stored, config)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it or remove it") from error
    bound = {key: values for key, values in difference.items() if not _is_free(key)}
    if bound and not allow_change:
        shown = "; ".join(f"{k}: {_show(old)} → {_show(new)}" for k, (old, new) in bound.items())
        raise ConfigChangedError(
            f"workdir {workdir} was made with another config ({shown}). Use that config, or "
            "another workdir, or go on nevertheless with run.allow_config_change=True"
        )
    return difference


def record_config(
    workdir: epath.PathLike, config: Mapping[str, Any], difference: Mapping[str, tuple[Any, Any]]
) -> None:
    """Write config.json, and first, where it replaces another one, what changed and when."""
    workdir = absolute(workdir)
    if (workdir / CONFIG).exists():
        if not difference:
            return
        changes = {key: {"old": old, "new": new} for key, (old, new) in difference.items()}
        record_change(workdir, changes, forced=any(not _is_free(key) for key in difference))
    text = json.dumps(_as_json(config), indent=2, ensure_ascii=False)
    write_atomically(workdir / CONFIG, text + "\n")


def record_change(
    workdir: epath.PathLike, changes: Mapping[str, Mapping[str, Any]], *, forced: bool
) -> None:
    """Note in the workdir what differs from when it was made, {name: {"old", "new"}}, and when.

    `forced`: only because the user allowed it.
    """
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"time": now, "forced": forced, "changes": changes}
    append_json_line(epath.Path(workdir) / CHANGES, row)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as JSON would give it back: tuples become lists."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config must consist of JSON values: {error}") from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of nested dicts."""
    if isinstance(value, dict) and (value or not prefix):
        flat = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
        return flat
    return {prefix: value}


def _show(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
