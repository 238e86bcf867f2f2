"""Signs of life of a run's processes, and what they say: who is dead, who hangs. Second floor.
Pure functions of what was heard and when, for the watch in peers.py."""

from collections.abc import Mapping
from typing import NamedTuple


class Sign(NamedTuple):
    """A process's sign of life."""

    host: str
    pid: int
    time: float  # on that host's clock: a new sign has another one
    moves: int  # how far it is; processes of one program count the same
    step: int
    place: str  # the line of its loop
    waits: bool  # inside JAX or Orbax: for its devices, or for the others
    done: bool  # it has left the run in good order


class Heard(NamedTuple):
    """The last sign of a process, and when it was new, in seconds of the hearer's clock."""

    sign: Sign
    at: float


Signs = Mapping[int, Heard]  # by process index, the hearer's own included


def hear(signs: dict[int, Heard], index: int, sign: Sign, now: float) -> None:
    """Take note of a process's sign, which may be an old one."""
    if index not in signs or signs[index].sign != sign:
        signs[index] = Heard(sign, now)


def describe(signs: Signs, index: int) -> str:
    """Return a process's name: "process 1 (host a, pid 7)"."""
    if index not in signs:
        return f"process {index}"
    return f"process {index} (host {signs[index].sign.host}, pid {signs[index].sign.pid})"


def find_dead(signs: Signs, hearer: int, heard_until: float, silent_seconds: float) -> str:
    """Return a sentence that names the other processes that fell silent; "" if there are none.

    `heard_until` is when the store was last read: later silence says nothing of its authors.
    """
    silent = [
        index
        for index, heard in sorted(signs.items())
        if index != hearer and not heard.sign.done and heard_until - heard.at > silent_seconds
    ]
    if not silent:
        return ""
    seconds = heard_until - max(signs[index].at for index in silent)
    return f"{_places(signs, silent)}: no sign of life for {seconds:.0f} s, dead or stopped"


def find_hanging(signs: Signs, num_processes: int, still_seconds: float) -> str:
    """Return a sentence that names who holds up the others, given that nobody moves.

    That are those furthest behind; of them, if they differ, those that are not waiting themselves.
    "" as long as not all processes have come: those may have data to prepare first.
    """
    here = {index: heard.sign for index, heard in signs.items() if not heard.sign.done}
    if len(signs) < num_processes or not here:
        return ""
    least = min(sign.moves for sign in here.values())
    behind = [index for index, sign in sorted(here.items()) if sign.moves == least]
    behind = [index for index in behind if not here[index].waits] or behind
    others = [index for index in sorted(here) if index not in behind]
    text = f"{_places(signs, behind)}: no progress for {still_seconds:.0f} s"
    if others:
        return f"{text}, while others wait: {_places(signs, others)}"
    return f"{text}, and no process is behind the others"


def _places(signs: Signs, indices: list[int], limit: int = 4) -> str:
    texts = [
        f"{describe(signs, index)} at step {signs[index].sign.step}, {signs[index].sign.place}"
        for index in indices[:limit]
    ]
    more = f"; and {len(indices) - limit} more" if len(indices) > limit else ""
    return "; ".join(texts) + more
