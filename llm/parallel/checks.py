"""Checks that configs make of themselves: numbers in their ranges, names that can name a folder.
Ground floor, without JAX: every config, on whatever floor, is checked in the same words."""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

# Sizes, steps and token ids are 32-bit integers on the devices.
LARGEST = 2**31 - 1
_KINDS = {
    "size": f"[1, {LARGEST}]",
    "count": f"[0, {LARGEST}]",
    "layers": "[1, 10000]",  # deeper models nobody means, and would not see built
    "seed": f"[0, {2**32 - 1}]",  # the bits that `jax.random.key` takes
    "positive": "(0, inf)",
    "not_negative": "[0, inf)",
    "share": "[0, 1]",
    "below_one": "[0, 1)",
}
_RANGE = re.compile(r"([\[(])(.+), (.+)([\])])")


def check_ranges(
    config: Any, *, section: str = "", within: Mapping[str, str] | None = None, **kinds: str
) -> None:
    """Check the numbers of a config: `check_ranges(self, section="model.", size="width")`.

    None passes where a field is declared with it, and a field without `float` must be whole. Of a
    tuple or mapping every number counts. NaN and infinities are in no range.

    Args:
      section: what messages put before a field's name, its dot included.
      within: other ranges by field, as mathematics writes them: {"modulus": "[2, 10000]"}.
      kinds: fields, with spaces between, by the ranges that have names here: size="width depth".

    Raises:
      ValueError: names the field, its value, and what is allowed.
    """
    ranges = dict(within or {})
    for kind, names in kinds.items():
        ranges |= dict.fromkeys(names.split(), _KINDS[kind])
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name, text in ranges.items():
        value, whole = getattr(config, name), "float" not in types[name]
        for number in _numbers(value, types[name]):
            if number is None and "None" in types[name]:
                continue
            if not _is_number(number, whole):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{section}{name}={shown(value)}: must be {kind}")
            if not _lies_in(number, text):
                allowed = _in_words(text, number)
                raise ValueError(f"{section}{name}={shown(value)}: must {allowed}")


def check_one_given(config: Any, *names: str) -> None:
    """Raise a ValueError unless just one of these fields is not None."""
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) != 1:
        told = " and ".join(given) or "none of them"
        raise ValueError(f"give one of {', '.join(names)}; given: {told}")


def check_multiple(name: str, number: int, of_name: str, of: int) -> None:
    """Raise a ValueError, with a number that would do, where one is no multiple of the other."""
    if number % of:
        raise ValueError(
            f"{name}={number} is not a multiple of {of_name}={of}; try {-(-number // of) * of}"
        )


def as_steps(steps: float) -> int:
    """Return a number of steps as a whole one, at least 1; ValueError where nothing counts so far.

    It says what lengths of runs are called, since one of them asked for so many.
    """
    if steps > LARGEST:
        raise ValueError(
            f"total_steps, total_tokens or total_epochs asks for {steps:.4g} steps; at most "
            f"{LARGEST} are counted"
        )
    return max(1, round(steps))


def check_names(names: Iterable[str], section: str) -> None:
    """Check that names of members can name folders and metrics.

    Raises:
      ValueError: names the member and what is allowed.
    """
    for name in names:
        if not re.fullmatch(r"[\w+=-][\w .+=-]{0,99}", name):
            raise ValueError(
                f"{section} has a member named {shown(name)}: names consist of letters, digits, "
                "spaces and _ . + = -, at most 100 of them, and begin with no dot"
            )


def shown(value: Any) -> str:
    """Return how a message shows a value, whatever it is: cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits; a thousand brackets
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _numbers(value: Any, declared: str) -> Iterable[Any]:
    if isinstance(value, dict) and declared.startswith("dict"):
        return value.values()
    return value if isinstance(value, tuple) and declared.startswith("tuple") else (value,)


def _is_number(value: Any, whole: bool) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)


def _lies_in(number: float, text: str) -> bool:
    opens, least, most, closes = _RANGE.fullmatch(text).groups()
    above = number > float(least) if opens == "(" else number >= float(least)
    below = number < float(most) if closes == ")" else number <= float(most)
    return above and below and math.isfinite(number)


def _in_words(text: str, number: float) -> str:
    """Return what is asked of a number that does not lie in the range."""
    opens, least, most, _ = _RANGE.fullmatch(text).groups()
    if not number < LARGEST:  # NaN among them
        return f"be finite and at most {most}" if most != "inf" else "be finite"
    if float(most) < LARGEST:
        return f"be in {text}"
    if float(least) in (0, 1):
        return "be positive" if opens == "(" or least == "1" else "not be negative"
    return f"be at least {least}"
