"""A ladder of runs as a typed config. Third floor, without JAX."""

import dataclasses

from llm.parallel.checks import check_ranges, shown
from llm.training.config import OptimizerConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """Runs over sizes, lengths and what members differ in: every combination is a run.

    Those of one size and length train together in one program (llm/training/members.py).
    """

    depths: tuple[int, ...] = (2, 3, 4)  # sizes, by the depth dial of llm/models/presets.py
    width_per_layer: int = 64
    head_dim: int = 64
    num_layers: int | None = None  # of all sizes; the dial then gives the width alone
    mup_base_depth: int | None = None  # muP, with this size as its base; None: standard
    # Lengths of the runs, each for every size: tokens D; or FLOPs, 6·N·D; or tokens a parameter,
    # D/N. N are the active parameters: the head counted, lookup tables not.
    tokens: tuple[int, ...] = ()
    flops: tuple[float, ...] = ()
    tokens_per_param: tuple[float, ...] = ()
    # Lengths of fewer or more tokens a parameter are left out; None: none is.
    tokens_per_param_between: tuple[float, float] | None = None
    # What members of a group differ in. A seed is of initialisation and of the order of the data.
    learning_rates: tuple[float, ...] = (3e-4,)
    weight_decays: tuple[float, ...] = (0.1,)
    init_scales: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    # Text to repeat: train on the rows that hold about so many tokens. None: all there are.
    unique_tokens: tuple[int | None, ...] = (None,)
    # Rates, decays and lengths above take the place of these.
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self):
        for name in ("depths", "learning_rates", "weight_decays", "init_scales", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}={shown(values)}: give at least one, each once")
        if not (self.tokens or self.flops or self.tokens_per_param):
            raise ValueError("give tokens, flops or tokens_per_param: how long the runs are")
        check_ranges(
            self,
            size="width_per_layer head_dim",
            not_negative="weight_decays",
            seed="seeds",
            layers="depths num_layers mup_base_depth",
            positive="tokens flops tokens_per_param learning_rates init_scales unique_tokens",
        )
        between = self.tokens_per_param_between
        if between is not None and not 0 <= between[0] < between[1]:
            raise ValueError(f"tokens_per_param_between={between}: give a least and a larger most")
        if not self.unique_tokens:
            raise ValueError("unique_tokens is empty: give (None,) for all the data")
