"""Processes of a run that were told different things would train nonsense, or wait for each other
for ever: a difference is named before they compute anything together. Ground floor."""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from jax._src import distributed  # its key-value store has no public name

_TIMEOUT_MILLISECONDS = 300_000  # all have joined already
_SHOWN = 3
_READ_SECONDS = 2.0  # process 0 keeps the store: the others read it before that one ends


def check_agreement(about: str, said: Mapping[str, Any]) -> None:
    """Compare with all other processes what this one was told, JSON values by name.

    `about` is a name of its own for each comparison.

    Raises:
      ValueError: in all processes: one was told other things than process 0.
    """
    run = distributed.global_state
    if run.client is None:
        return
    text = json.dumps(said, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    run.client.key_value_set(f"{about}/said/{run.process_id}", text)
    run.client.key_value_set(f"{about}/digest/{run.process_id}", digest)
    run.client.wait_at_barrier(about, _TIMEOUT_MILLISECONDS)
    found = run.client.key_value_dir_get(f"{about}/digest/")
    digests = {int(key.rpartition("/")[2]): digest for key, digest in found}
    others = [index for index in sorted(digests) if digests[index] != digests[0]]
    if not others:
        return
    theirs, first = (
        json.loads(run.client.blocking_key_value_get(f"{about}/said/{i}", _TIMEOUT_MILLISECONDS))
        for i in (others[0], 0)
    )
    if run.process_id == 0:
        time.sleep(_READ_SECONDS)
    raise ValueError(
        f"process {others[0]} and process 0 of one run differ in {_difference(theirs, first)}; "
        "start the same code with the same flags, INDEX aside"
    )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    shown = [f"{k} ({_show(one.get(k))}, {_show(other.get(k))})" for k in keys[:_SHOWN]]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(shown) + more


def _show(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
