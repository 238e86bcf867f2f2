"""Optimizer and schedule as typed configs. Second floor, without JAX."""

import dataclasses
from typing import Literal

from llm.parallel.checks import check_ranges
from llm.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer. `learning_rate` is the peak that the schedule scales."""

    name: Literal["adamw", "muon", "lion", "adafactor"] = "adamw"
    learning_rate: float = 3e-4
    beta1: float = 0.9  # also Muon's momentum
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # decoupled; multiplied by the learning rate
    decay_embeddings: bool = True
    clip_norm: float | None = 1.0
    # Muon leaves embeddings, head, norms and biases to AdamW, at this peak.
    adam_learning_rate: float = 3e-3
    adam_beta1: float = 0.9
    ema_decay: float | None = None

    def __post_init__(self):
        check_ranges(
            self,
            section="optimizer.",
            not_negative="weight_decay",
            positive="learning_rate adam_learning_rate epsilon clip_norm",
            below_one="beta1 beta2 adam_beta1 ema_decay",
        )


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """When a loss is a spike, and what is left out for it (llm/training/spikes.py).

    Twenty deviations of a loss that scatters by 0.03 nats are a rise of 0.6.
    """

    deviations: float = 0.0  # above the median, in robust standard deviations; 0: never
    window_steps: int = 100  # steps that median and deviation are taken over
    rewind_steps: int = 100  # back from the spike, at least, to a checkpoint
    skip_steps: int = 200  # batches left out from there on; those up to the spike in any case

    def __post_init__(self):
        check_ranges(
            self,
            section="spikes.",
            not_negative="deviations",
            size="rewind_steps skip_steps",
            within={"window_steps": "[3, 1000000]"},
        )

    def check_run(self, run: RunConfig) -> None:
        """Check that the run will have a checkpoint to go back to.

        Raises:
          ValueError: it does not save by steps, or does not keep them for long enough.
        """
        if not self.deviations:
            return
        if not run.save_every_steps:
            raise ValueError("spikes.deviations needs checkpoints: set run.save_every_steps")
        if run.save_every_seconds is not None:
            raise ValueError("spikes.deviations needs saves by step: leave run.save_every_seconds")
        # Kept are those up to a spike; and going back ends up to an interval further.
        needed = -(-self.rewind_steps // run.save_every_steps) + 2
        if run.keep_newest_checkpoints < needed:
            raise ValueError(
                f"spikes.rewind_steps={self.rewind_steps} needs older checkpoints than are kept: "
                f"set run.keep_newest_checkpoints={needed}, or save less often"
            )


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Which parameters learn, and how fast: globs over names such as layers/3/attention/*.

    Source: layer-wise rates are Howard & Ruder 2018, arXiv:1801.06146, section 3.2; with the decay
    a layer of Clark et al. 2020 (ELECTRA), arXiv:2003.10555, appendix B.
    """

    train: tuple[str, ...] = ()  # empty: all; or, with an adapter, its factors and scalar heads
    freeze: tuple[str, ...] = ()  # of those
    # Learning rates by pattern, as factors; where several match they multiply.
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    layer_decay: float = 1.0  # rate of a layer over that of the one above; the head's is 1

    def __post_init__(self):
        check_ranges(
            self, section="trainable.", not_negative="rates", within={"layer_decay": "(0, 1]"}
        )


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Direct optimisation of a policy on preferences: see llm/objectives/preference.py."""

    method: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0  # dpo's share of labels taken to be wrong
    simpo_margin: float = 0.5
    desirable_level: float = 0.5  # kto: from this level on a response is a good one
    # kto's λ_D and λ_U, of good and bad responses: to balance them where one kind is rarer.
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.method in ("dpo", "ipo", "kto")

    def __post_init__(self):
        check_ranges(
            self,
            section="preference.",
            positive="beta desirable_weight undesirable_weight",
            within={"label_smoothing": "[0, 0.5)"},
        )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves: a linear warm-up, then a shape. Lengths: steps or tokens."""

    name: Literal["constant", "cosine", "linear", "warmup_stable_decay", "inverse_sqrt"] = "cosine"
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    # Of warmup_stable_decay's last, linear stretch.
    decay_steps: int | None = None
    decay_tokens: int | None = None
    final_fraction: float = 0.1  # of the peak, at the end

    def __post_init__(self):
        for name in ("warmup", "decay"):
            steps, tokens = getattr(self, f"{name}_steps"), getattr(self, f"{name}_tokens")
            if steps is not None and tokens is not None:
                raise ValueError(f"schedule: give {name}_steps or {name}_tokens, not both")
        check_ranges(
            self,
            section="schedule.",
            count="warmup_steps decay_steps",
            not_negative="warmup_tokens decay_tokens",
            share="final_fraction",
        )
