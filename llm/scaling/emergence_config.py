"""Studies of emergence as typed configs, one a phenomenon. Third floor, without JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from llm.models.config import TransformerConfig
from llm.parallel.checks import LARGEST, check_names, check_ranges, shown
from llm.training.config import OptimizerConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What every phenomenon's runs have. Runs of one shape train together, one for each seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    total_steps: int = 1000
    num_evaluations: int = 40  # evenly over the steps, and one before the first
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(name="constant")

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={shown(self.seeds)}: give at least one, each once")
        check_ranges(self, size="total_steps num_evaluations", seed="seeds")
        if (self.schedule.warmup_steps or 0) > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds "
                f"total_steps={self.total_steps}"
            )


@dataclasses.dataclass(frozen=True)
class GrokkingConfig(StudyConfig):
    """Modular addition, learnt by heart long before it is understood; with and without decay.

    Source: Power et al. 2022, arXiv:2201.02177; Nanda et al. 2023, arXiv:2301.05217.
    """

    modulus: int = 113
    train_fraction: float = 0.3
    weight_decays: tuple[float, ...] = (1.0, 0.0)
    model: TransformerConfig = TransformerConfig()

    def __post_init__(self):
        super().__post_init__()
        # All pairs are in memory, a few times.
        check_ranges(
            self,
            not_negative="weight_decays",
            within={"modulus": "[2, 10000]", "train_fraction": "(0, 1)"},
        )
        _check_lists(self, "weight_decays")
        _check_models({"model": self.model}, self.modulus + 1, 3)


@dataclasses.dataclass(frozen=True)
class AdditionConfig(StudyConfig):
    """Addition of numbers, the sum plain or reversed, by size and by number of examples.

    Source: Lee et al. 2023, arXiv:2307.03381.
    """

    digits: tuple[int, ...] = (3,)
    orders: tuple[Literal["plain", "reversed"], ...] = ("plain", "reversed")
    num_examples: tuple[int, ...] = (5000,)
    num_held_out: int = 1000
    batch_sequences: int = 64
    models: dict[str, TransformerConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        # Sums of 8 digits are drawn from 10^16 pairs; those of 9 would not fit 64 bits.
        check_ranges(
            self, size="num_examples num_held_out batch_sequences", within={"digits": "[1, 9]"}
        )
        _check_lists(self, "digits", "orders", "num_examples")
        for digits in self.digits:
            _check_models(_members("models", self.models), 12, 3 * digits + 2)


@dataclasses.dataclass(frozen=True)
class InductionConfig(StudyConfig):
    """Attention-only models on repeated random segments: with two layers, and with one.

    Source: Olsson et al. 2022, transformer-circuits.pub.
    """

    vocab_size: int = 64
    length_tokens: int = 64
    shortest_segment_tokens: int = 8
    batch_sequences: int = 64
    num_held_out: int = 128
    models: dict[str, TransformerConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            size="shortest_segment_tokens vocab_size length_tokens batch_sequences num_held_out",
        )
        if 2 * self.shortest_segment_tokens > self.length_tokens:
            raise ValueError(
                f"shortest_segment_tokens={self.shortest_segment_tokens} does not fit twice into "
                f"length_tokens={self.length_tokens}"
            )
        _check_models(_members("models", self.models), self.vocab_size, self.length_tokens)


@dataclasses.dataclass(frozen=True)
class ParityConfig(StudyConfig):
    """Multitask sparse parity: skills learnt one after the other, their mean a power law.

    Source: Michaud et al. 2023, arXiv:2303.13506.
    """

    num_subtasks: int = 50
    num_bits: int = 50
    subset_bits: int = 3
    alpha: float = 0.4
    batch_rows: int = 4096
    held_out_rows_per_subtask: int = 200
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            size="num_bits subset_bits batch_rows held_out_rows_per_subtask widths",
            within={"num_subtasks": "[1, 100000]", "alpha": "[0, 100]"},
        )
        _check_lists(self, "widths")
        if self.subset_bits > self.num_bits:
            raise ValueError(f"subset_bits={self.subset_bits} exceeds num_bits={self.num_bits}")


@dataclasses.dataclass(frozen=True)
class FewShotConfig(StudyConfig):
    """Tasks told by examples alone, learnt as a mixture in pretraining, by size and shots.

    Source: Brown et al. 2020, arXiv:2005.14165, figure 1.2.
    """

    shots: tuple[int, ...] = (0, 1, 2, 4)
    word_letters: int = 4
    batch_sequences: int = 64
    num_held_out: int = 256
    models: dict[str, TransformerConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, size="word_letters batch_sequences num_held_out", within={"shots": "[0, 10000]"}
        )
        _check_lists(self, "shots")
        length = (max(self.shots) + 1) * (2 * self.word_letters + 2) - 2
        _check_models(_members("models", self.models), 28, length)


def _check_lists(study: StudyConfig, *names: str) -> None:
    for name in names:
        values = getattr(study, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name}={shown(values)}: give at least one, each once")


def _members(name: str, models: Mapping[str, TransformerConfig]) -> dict[str, TransformerConfig]:
    if not models:
        raise ValueError(f"{name} is empty: there is nothing to train")
    check_names(models, name)
    return {f"{name}.{member}": model for member, model in models.items()}


def _check_models(models: Mapping[str, TransformerConfig], vocab_size: int, length: int) -> None:
    """Check that models have the tokens and, with a table, the positions of a phenomenon's rows."""
    if length > LARGEST:
        raise ValueError(f"rows would be of {length} tokens; at most {LARGEST} can be")
    for name, model in models.items():
        if model.vocab_size < vocab_size:
            raise ValueError(f"{name}.vocab_size={model.vocab_size}: must be at least {vocab_size}")
        if model.positions == "learned" and model.max_length_tokens < length:
            raise ValueError(
                f"{name}.max_length_tokens={model.max_length_tokens}: must be at least {length}"
            )
