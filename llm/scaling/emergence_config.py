"""Studies of emergence as typed configs, one a phenomenon. Third floor, without JAX."""

import dataclasses
from typing import Literal

from llm.models.config import TransformerConfig
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
            raise ValueError(f"seeds={self.seeds}: give at least one, each once")
        for name in ("total_steps", "num_evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if (self.schedule.warmup_steps or 0) > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds the "
                f"{self.total_steps} steps of the run"
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
