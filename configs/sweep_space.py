"""What the members of a sweep are made of: values for fields, as tuples of {field: value}.

    members = product(
        grid({"optimizer.name": ["adamw", "muon"], "seed": [0, 1]}),
        when({"optimizer.name": "muon"}, random(4, 0, {"optimizer.learning_rate": log_uniform(…)})),
    )

Two of them one after the other are their sum, `grid(…) + listed(…)`; to leave some out, or to have
a field follow from others, `tuple(m | {…} for m in product(…) if …)`. `recipe` is a field, too.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.dataclass_config import ConfigError

Member = dict[str, Any]
Members = tuple[Member, ...]
Distribution = Callable[[np.random.Generator], Any]


class When(NamedTuple):
    """What members that a product has made so far get further, if they fit a condition."""

    condition: Mapping[str, Any]
    then: Members
    otherwise: Members


def grid(values: Mapping[str, Sequence[Any]]) -> Members:
    """Return every combination of the fields' values; the last field varies fastest."""
    _check_values("grid", values)
    return tuple(dict(zip(values, row, strict=True)) for row in itertools.product(*values.values()))


def zipped(values: Mapping[str, Sequence[Any]]) -> Members:
    """Return the first values of all fields, then their second ones, and so on.

    Raises:
      ConfigError: the fields have unequal numbers of values.
    """
    _check_values("zipped", values)
    lengths = {name: len(each) for name, each in values.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise ConfigError(f"zipped: fields need equally many values, but {told}")
    return tuple(dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


def listed(*members: Mapping[str, Any]) -> Members:
    """Return the members as they are given."""
    return tuple(dict(member) for member in members)


def random(num: int, seed: int, values: Mapping[str, Distribution | Sequence[Any]]) -> Members:
    """Return so many members, each field drawn from its distribution, or from a list evenly.

    A field's draws depend on the seed and its name alone: more members, or another field, leave
    those that there are as they were. Draws from lists can repeat a member.

    Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".
    """
    columns = {}
    for name, distribution in values.items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8]))
        draw = distribution if callable(distribution) else choice(distribution)
        columns[name] = [draw(rng) for _ in range(num)]
    return zipped(columns)


def product(*factors: Members | When) -> Members:
    """Return every combination of a member of each factor; later factors win a field both have."""
    members: Members = ({},)
    for factor in factors:
        members = tuple(
            {**member, **further} for member in members for further in _further(factor, member)
        )
    return members


def when(condition: Mapping[str, Any], then: Members, otherwise: Members = ({},)) -> When:
    """Return a factor of `product`: `then` for members with the values, `otherwise` for others."""
    return When(dict(condition), then, otherwise)


def _further(factor: Members | When, member: Member) -> Members:
    if not isinstance(factor, When):
        return factor
    missing = [name for name in factor.condition if name not in member]
    if missing:
        raise ConfigError(
            f"when: no factor before it sets {missing[0]}; those before set "
            f"{', '.join(member) or 'nothing'}"
        )
    fits = all(member[name] == value for name, value in factor.condition.items())
    return factor.then if fits else factor.otherwise


# ------------------------------------------------------------------------- distributions


def uniform(low: float, high: float) -> Distribution:
    """Return draws of a number from low to high, to four digits."""
    return lambda rng: _rounded(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Return draws of a positive number whose logarithm is uniform, to four digits.

    Raises:
      ConfigError: low is not positive, or above high.
    """
    if not 0 < low <= high:
        raise ConfigError(f"log_uniform({low}, {high}): give two positive numbers, the lower first")
    return lambda rng: _rounded(math.exp(rng.uniform(math.log(low), math.log(high))))


def integers(low: int, high: int) -> Distribution:
    """Return draws of a whole number from low to high, both included."""
    return lambda rng: int(rng.integers(low, high, endpoint=True))


def choice(values: Sequence[Any]) -> Distribution:
    """Return draws of one of the values, each as likely."""
    return lambda rng: values[int(rng.integers(len(values)))]


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def _check_values(name: str, values: Mapping[str, Sequence[Any]]) -> None:
    for field, each in values.items():
        if isinstance(each, str) or not isinstance(each, Sequence) or not each:
            raise ConfigError(f"{name}: {field} needs a list of values, got {each!r}")
