"""The members of a sweep: checked configs, stable names, and what a workdir keeps of them."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from configs import schema
from configs.command_line import Override, as_override, load_config
from configs.dataclass_config import ConfigError, paths_below
from configs.schema import SweepConfig
from llm.data.disk import read_json_object
from llm.training.files import canonical_json, text_digest, write_atomically
from llm.training.run_config import check_config, config_difference

STAGES = {
    "pretrain": schema.PretrainConfig,
    "finetune": schema.FinetuneConfig,
    "reward": schema.RewardModelConfig,
    "preference": schema.DirectPreferenceConfig,
    "rlhf": schema.RlhfConfig,
}
_SWEEP, _MEMBER = "sweep.json", "member.json"
_LONGEST_NAME = 72


class SweepMember(NamedTuple):
    """One run of a sweep."""

    name: str  # of its directory
    fields: Mapping[str, Any]  # as the sweep gives them
    recipe: str  # the sweep's, unless the member has one of its own
    overrides: tuple[Override, ...]  # what is typed after the recipe, shared fields first
    config: Any  # the stage's, whole and checked

    @property
    def total_steps(self) -> int | None:
        """How long the run is; None where only its data will tell."""
        if isinstance(self.config, schema.PretrainConfig):
            return self.config.num_steps
        return getattr(self.config, "total_steps", None)


def resolve(sweep: SweepConfig) -> list[SweepMember]:
    """Return the members of a sweep, each once, with the configs that their runs will have.

    `recipe` among a member's fields is no field of the stage: the member starts from that recipe.

    Raises:
      ConfigError: a member does not fit the stage's config; names it and the field.
    """
    config_type = STAGES[sweep.stage]
    paths = list(paths_below(config_type))
    members: dict[str, SweepMember] = {}
    for i, fields in enumerate(sweep.members):
        name = name_of(fields, paths)
        if name in members:
            if members[name].fields != fields:
                raise ConfigError(f"members[{i}]: its directory {name} is that of another member")
            continue  # random draws from lists repeat themselves
        whole = {k: v for each in (*sweep.shared, fields) for k, v in each.items()}
        recipe = whole.pop("recipe", sweep.recipe)
        overrides = tuple(as_override(path, value) for path, value in whole.items())
        try:
            config = load_config(recipe, overrides, config_type)
        except ConfigError as error:
            raise ConfigError(f"members[{i}]: {error}") from error
        members[name] = SweepMember(name, fields, recipe, overrides, config)
    return list(members.values())


def name_of(fields: Mapping[str, Any], paths: Sequence[str]) -> str:
    """Return the directory of a member: `learning_rate=0.001,seed=1`.

    It follows from the member's own fields, so that others may come and go. A field is called by
    the last parts of its path that no other field of the stage ends in; a name that would be long,
    or has letters that no directory should have, is cut and ends in a digest.
    """
    if not fields:
        return "base"
    parts = [f"{_short(path, paths)}={_plain(fields[path])}" for path in sorted(fields)]
    whole = ",".join(parts)
    name = re.sub(r"[^\w.,=+-]+", "-", whole)
    if name == whole and len(name) <= _LONGEST_NAME:
        return name
    digest = text_digest(canonical_json(_as_json(fields)))[:8]
    return f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{digest}"


def _short(path: str, paths: Iterable[str]) -> str:
    words = path.split(".")
    for count in range(1, len(words)):
        ending = ".".join(words[-count:])
        if not any(p != path and f".{p}".endswith(f".{ending}") for p in paths) and path in paths:
            return ending
    return path


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_json(fields: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(fields), default=str))


def varying_fields(members: Sequence[SweepMember]) -> list[str]:
    """Return the fields in which the members differ, in the sweep's order."""
    names = dict.fromkeys(name for member in members for name in member.fields)
    return [
        name
        for name in names
        if len({canonical_json(_as_json({"": m.fields.get(name)})) for m in members}) > 1
    ]


# ------------------------------------------------------------------------------- record


def record_sweep(workdir: epath.Path, sweep: SweepConfig, members: Sequence[SweepMember]) -> str:
    """Write sweep.json, and each member's member.json; return in words what is new or gone.

    Raises:
      ConfigChangedError: a member's directory holds a run of another config.
    """
    for member in members:
        check_config(workdir / member.name, dataclasses.asdict(member.config))
    file = workdir / _SWEEP
    before = read_json_object(file)["members"] if file.exists() else {}
    now = {member.name: _as_json(member.fields) for member in members}
    record = {"sweep": dataclasses.asdict(sweep) | {"members": None}, "members": now}
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(record, indent=1, default=str))
    bases = {recipe: _base(recipe, sweep.stage) for recipe in {m.recipe for m in members}}
    for member in members:
        _record_member(workdir / member.name, sweep, member, bases[member.recipe])
    return "\n".join([members_given(sweep, members), *(_changes(before, now) if before else ())])


def members_given(sweep: SweepConfig, members: Sequence[SweepMember]) -> str:
    """Return in words how many members there are, and how many more were given."""
    repeats = len(sweep.members) - len(members)
    return f"{len(members)} members" + (f" ({repeats} more repeat them)" if repeats else "")


def _base(recipe: str, stage: str) -> dict[str, Any]:
    try:
        return dataclasses.asdict(load_config(recipe, [], STAGES[stage]))
    except ConfigError:
        return {}  # a recipe that only its members complete


def _record_member(
    folder: epath.Path, sweep: SweepConfig, member: SweepMember, base: Mapping[str, Any]
) -> None:
    difference = config_difference(base, dataclasses.asdict(member.config)) if base else {}
    record = {
        "stage": sweep.stage,
        "recipe": member.recipe,
        "fields": _as_json(member.fields),
        "difference": {
            key: {"recipe": old, "member": new} for key, (old, new) in difference.items()
        },
    }
    text = json.dumps(record, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _MEMBER).exists() or (folder / _MEMBER).read_text() != text:
        write_atomically(folder / _MEMBER, text)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    added = [name for name in now if name not in before]
    gone = [name for name in before if name not in now]
    lines = [f"{len(added)} new since the last start: {'; '.join(added)}"] if added else []
    if gone:
        lines.append(
            f"{len(gone)} no longer in the sweep, their directories stay: {'; '.join(gone)}"
        )
    return lines
