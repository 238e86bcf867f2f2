"""Training runs of many sizes: what every scaling law is fitted to. Third floor.

`llm.scaling.table` reads them from a file.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

FLOPS_PER_PARAM_TOKEN = 6  # C = 6·N·D, Kaplan et al. 2020, arXiv:2001.08361, section 2.1
_SAME_SIZE = 0.01  # sizes within 1% are one: tables read off plots repeat them inexactly


class NotIdentifiableError(ValueError):
    """What was asked for cannot be told from these runs: what is missing, and what would help."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """R rows of a table, each a model of N parameters after D tokens, and its loss.

    `run` numbers the training runs: rows of one number are points of one training curve.
    """

    num_params: Float[np.ndarray, " R"]
    num_tokens: Float[np.ndarray, " R"]
    flops: Float[np.ndarray, " R"]
    loss: Float[np.ndarray, " R"]  # nats per token
    run: Int[np.ndarray, " R"]
    row: Int[np.ndarray, " R"]  # in the file, for messages; the header is row 1
    unique_tokens: Float[np.ndarray, " R"] | None = None

    @classmethod
    def of(
        cls,
        num_params: Float[np.ndarray, " R"],
        num_tokens: Float[np.ndarray, " R"],
        loss: Float[np.ndarray, " R"],
        **others,
    ) -> "Runs":
        """Return runs of 6·N·D FLOPs, each row a run of its own, unless `others` say otherwise."""
        number = np.arange(len(loss))
        flops = FLOPS_PER_PARAM_TOKEN * num_params * num_tokens
        defaults = {"flops": flops, "run": number, "row": number + 2}
        return cls(num_params, num_tokens, loss=loss, **{**defaults, **others})

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, chosen: Bool[np.ndarray, " R"] | Int[np.ndarray, " _"]) -> "Runs":
        """Return the rows that a mask or an index chooses."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Runs(**{name: None if x is None else x[chosen] for name, x in values.items()})

    def ends(self) -> "Runs":
        """Return the last row, by tokens, of each run."""
        order = np.lexsort((self.num_tokens, self.run))
        last = np.append(np.diff(self.run[order]) != 0, True)
        return self.select(np.sort(order[last]))

    @property
    def tokens_per_param(self) -> Float[np.ndarray, " R"]:
        return self.num_tokens / self.num_params


def group_sizes(
    sizes: Float[np.ndarray, " R"], tolerance: float = _SAME_SIZE
) -> Int[np.ndarray, " R"]:
    """Return the group of each size, from 0 by size; a group spans at most `tolerance`, relative.

    Sizes are gone through upwards; one that is too far from the first of its group begins the next.
    """
    groups = np.empty(len(sizes), int)
    first, group = -np.inf, -1
    for i in np.argsort(sizes, kind="stable"):
        if sizes[i] > first * (1 + tolerance) or group < 0:
            first, group = sizes[i], group + 1
        groups[i] = group
    return groups


def count_sizes(sizes: Float[np.ndarray, " R"]) -> int:
    """Return how many sizes differ by more than 1%."""
    return int(group_sizes(sizes).max(initial=-1)) + 1


def split_by_flops(runs: Runs, fraction: float) -> tuple[Runs, Runs]:
    """Return the runs without the largest by FLOPs, and those: `fraction` of the rows, at least 1.

    Rows of 2% fewer FLOPs than the smallest that is held out are held out as well: steps are whole,
    so runs of one budget differ a little, and no budget is to be on both sides.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}; it lies between 0 and 1")
    count = max(1, round(fraction * len(runs)))
    threshold = np.sort(runs.flops)[-count]
    held_out = runs.flops >= threshold * 0.98
    return runs.select(~held_out), runs.select(held_out)
