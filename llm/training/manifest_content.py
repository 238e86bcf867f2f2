"""What a manifest's content must be before anything is read by it. A workdir may be anybody's."""

import math
import pathlib
import re
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 and its kin by it
import numpy as np


def find_problem(content: Any) -> str | None:
    """Return what is wrong with a manifest's content, None where nothing is."""
    if not isinstance(content, dict):
        return "it is no object"
    for name in ("step", "tokens"):
        if not _is_count(content.get(name, 0)):
            return f"{name} is no number"
    arrays, files = content.get("arrays"), content.get("files")
    if "step" not in content or not isinstance(arrays, dict) or not isinstance(files, dict):
        return "it lacks its step, arrays or files"
    for name, facts in files.items():
        if not _stays_below(name):
            return f"the file {name!r:.80} is not in the step's directory"
        if not isinstance(facts, dict) or not _is_count(facts.get("bytes")):
            return f"of the file {name!r:.80} it tells no size"
        if not isinstance(facts.get("sha256"), str):
            return f"of the file {name!r:.80} it tells no digest"
    for name, facts in arrays.items():
        if not isinstance(facts, dict) or not _is_array(facts):
            return f"of the array {name!r:.80} it tells no shape, type and digest"
        parents = ("/".join(name.split("/")[:n]) for n in range(1, name.count("/") + 1))
        if any(parent in arrays for parent in parents):
            return f"the array {name!r:.80} lies in another array"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _stays_below(name: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    plain = not re.search(r"[\\\\:\0]", name)  # of other systems, and of none
    return bool(parts) and plain and parts[0] != "/" and ".." not in parts


def _is_array(facts: dict[str, Any]) -> bool:
    shape = facts.get("shape")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        return False
    if not isinstance(facts.get("digest"), str) or not isinstance(facts.get("dtype"), str):
        return False
    try:
        known = not np.dtype(facts["dtype"]).hasobject
    except TypeError:
        return False
    return known and math.prod(shape) < 2**62 and len(shape) <= 32
