"""What a policy-gradient run samples, how it is rewarded and what it learns from. Without JAX."""

import dataclasses
from typing import Literal

from llm.parallel.checks import check_ranges

AlgorithmName = Literal["ppo", "rloo", "reinforce", "grpo"]


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The divergence from the reference: its price, and where it is paid."""

    coefficient: float = 0.05  # β, of nats
    # "reward": k1 a token in the reward, whose optimum is π ∝ π_ref·exp(reward/β). "loss_k2": ½ of
    # the squared log-ratio of each response in the loss, the same gradient on policy. "loss_k3":
    # GRPO's published form, to reproduce it: its optimum is another, π = β·π_ref/(λ − reward).
    # In the loss it is divided by what the policy's loss is divided by, so that β means the same.
    place: Literal["reward", "loss_k2", "loss_k3"] = "reward"
    target_nats: float | None = None  # a response; steers the coefficient. None: fixed
    horizon_responses: int = 10_000  # of that steering

    def __post_init__(self):
        check_ranges(
            self,
            section="kl.",
            not_negative="coefficient",
            positive="target_nats",
            size="horizon_responses",
        )


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """How sampled and scored responses become an update."""

    # "ppo": a learnt value and GAE. "rloo": the mean of a prompt's other responses is the baseline.
    # "grpo": the mean of all of them. "reinforce": a moving average of scores is.
    name: AlgorithmName = "ppo"
    epochs: int = 1  # over each step's responses
    minibatches: int = 1  # updates an epoch
    clip_low: float = 0.2
    clip_high: float = 0.2  # DAPO: 0.28
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float | None = 0.2
    value_weight: float = 1.0  # of the value's loss; it has parameters of its own
    # To mean 0 and variance 1 over a step's tokens. Not with groups, whose baseline it would move.
    whiten_advantages: bool = False
    scale_scores: bool = False  # by their running deviation, without a shift
    group_std: bool = False  # GRPO as first published; biased towards easy and hard prompts
    # Further draws of prompts until all groups' scores differ (DAPO); what is left is masked.
    # None: groups of equal scores stay in, with advantages of 0.
    dynamic_draws: int | None = None
    baseline_decay: float = 0.9  # of REINFORCE's moving average
    # Off the score of a response that does not end by itself; and DAPO's soft punishment, up to 1,
    # of the last so many tokens before the limit (0: none). Where both apply, the larger is taken.
    missing_eos_penalty: float = 1.0
    overlong_buffer_tokens: int = 0
    entropy_weight: float = 0.0
    ptx_weight: float = 0.0  # of the language-model loss on `ptx` data, nats a token
    # Approximate nats a token from the step's old policy: an update that finds the policy beyond it
    # is not made, nor are those after it in the step.
    stop_kl: float | None = None

    def __post_init__(self):
        check_ranges(
            self,
            section="algorithm.",
            size="epochs minibatches",
            count="dynamic_draws overlong_buffer_tokens",
            not_negative="value_weight missing_eos_penalty entropy_weight ptx_weight",
            positive="clip_low clip_high value_clip stop_kl",
            share="gamma lam baseline_decay",
        )
        if self.whiten_advantages and self.name in ("rloo", "grpo"):
            raise ValueError(
                f"algorithm.whiten_advantages with name={self.name!r}: centred over the batch, a "
                "group of equal scores would teach something; set whiten_advantages=False"
            )


def check_kl_place(kl: KLConfig, algorithm: AlgorithmConfig) -> None:
    """Raise a ValueError where a divergence in the loss would not cost `kl.coefficient` a nat."""
    if kl.place == "reward":
        return
    remedy = "; set it otherwise, or kl.place='reward'"
    if algorithm.whiten_advantages:
        raise ValueError(
            f"kl.place={kl.place!r} with algorithm.whiten_advantages: rewards are rescaled and the "
            f"divergence is not{remedy}"
        )
    # GRPO as published has both with k3: it is there to be reproduced.
    if kl.place == "loss_k2" and algorithm.aggregation == "sequence_mean":
        raise ValueError(
            "kl.place='loss_k2' with algorithm.aggregation='sequence_mean': rewards are divided by "
            f"each response's length and its divergence is not{remedy}"
        )
    if kl.place == "loss_k2" and algorithm.group_std:
        raise ValueError(
            "kl.place='loss_k2' with algorithm.group_std: rewards are divided by each group's "
            f"deviation and the divergence is not{remedy}"
        )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One source of reward; a step's score is their weighted sum."""

    # "model": a workdir of experiments.reward. "arithmetic": the last number of the response is
    # the row's answer. "pattern": the response matches a regular expression. "reasoning_gym": its
    # own checker. "python": a function (prompts, responses) → scores, "package.module:name".
    kind: Literal["model", "arithmetic", "pattern", "reasoning_gym", "python"] = "model"
    path: str = ""  # workdir; regular expression; data set of reasoning-gym; function
    answer_field: str = "answer"  # of the prompt's row
    weight: float = 1.0
    batch_responses: int = 64  # a model scores so many at a time

    def __post_init__(self):
        if self.kind != "arithmetic" and not self.path:
            raise ValueError(f"rewards: kind {self.kind!r} needs a path; it is empty")
        check_ranges(self, size="batch_responses", within={"weight": "(-inf, inf)"})


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What a step samples."""

    prompts: int = 16  # a step
    group: int = 1  # responses a prompt
    prompt_tokens: int = 64  # a longer prompt is skipped and counted
    response_tokens: int = 48
    temperature: float = 1.0  # the policy that is learnt is softmax(logits / temperature)
    # Mean absolute difference of log-probabilities, trainer against sampler, that ends the run.
    max_log_prob_gap: float = 0.05

    def __post_init__(self):
        check_ranges(
            self,
            section="rollout.",
            positive="temperature max_log_prob_gap",
            size="prompts group prompt_tokens response_tokens",
        )


def check_groups(rollout: RolloutConfig, algorithm: AlgorithmConfig) -> None:
    """Raise a ValueError where responses to one prompt are compared and there is one of each."""
    if rollout.group > 1:
        return
    if algorithm.name in ("rloo", "grpo"):
        raise ValueError(
            f"algorithm.name={algorithm.name!r} compares responses to one prompt: "
            f"rollout.group={rollout.group} must be at least 2"
        )
    if algorithm.dynamic_draws is not None:
        raise ValueError("algorithm.dynamic_draws needs groups: rollout.group of at least 2")
