"""Every field of every stage on one page. Sections are declared beside the code that reads them."""

import dataclasses
from typing import Any, Literal

from llm.data.config import ComparisonsConfig, DataConfig, SourceConfig, TokenizerConfig
from llm.evaluation.config import JudgeConfig
from llm.launch.config import (
    CostConfig,
    HalvingConfig,
    LocalConfig,
    SkyPilotConfig,
    SlurmConfig,
)
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.parallel.checks import (
    as_steps,
    check_multiple,
    check_names,
    check_one_given,
    check_ranges,
    shown,
)
from llm.parallel.config import MeshConfig
from llm.rl.config import (
    AlgorithmConfig,
    KLConfig,
    RewardConfig,
    RolloutConfig,
    check_groups,
    check_kl_place,
)
from llm.scaling.config import LadderConfig
from llm.scaling.emergence_config import (
    AdditionConfig,
    FewShotConfig,
    GrokkingConfig,
    InductionConfig,
    ParityConfig,
)
from llm.training.config import (
    OptimizerConfig,
    PreferenceConfig,
    ScheduleConfig,
    SpikeConfig,
    TrainableConfig,
)
from llm.training.run_config import RunConfig


def _check_source(source: str, adapter: AdapterConfig) -> None:
    if not source:
        raise ValueError("source is empty: name a workdir, a Hugging Face directory, …")
    if adapter.quantize != "none" and not adapter.rank:
        raise ValueError(
            f"adapter.quantize={adapter.quantize!r} freezes what it stores: set adapter.rank to "
            "learn something"
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What the loop measures while it trains."""

    every_steps: int = 500  # and at the end; 0: never
    at_start: bool = False  # before the first step too: what a later stage forgets is seen so
    max_sequences: int | None = 512  # held-out rows a source; None: all of them
    prompts: tuple[str, ...] = ()  # continued greedily at each evaluation
    sample_tokens: int = 48

    def __post_init__(self):
        check_ranges(
            self, section="evaluation.", count="every_steps", size="max_sequences sample_tokens"
        )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every stage that trains on packed rows has."""

    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    spikes: SpikeConfig = SpikeConfig()
    run: RunConfig = RunConfig()
    accumulate_steps: int = 1  # microbatches a step
    z_loss: float = 0.0
    # Of models with experts: Switch's weight of the balance, ST-MoE's of the routers' log² Z.
    router_balance_weight: float = 0.01
    router_z_weight: float = 0.001
    loss_tile_tokens: int = 4096  # whose logits a device holds at a time
    seed: int = 0

    def __post_init__(self):
        check_ranges(
            self, size="accumulate_steps loss_tile_tokens", seed="seed",
            not_negative="z_loss router_balance_weight router_z_weight",
        )  # fmt: skip
        batch, parts = self.data.batch_sequences, self.accumulate_steps
        check_multiple("data.batch_sequences", batch, "accumulate_steps", parts)
        self.spikes.check_run(self.run)
        if self.spikes.deviations and self.data.packing == "online":
            raise ValueError("spikes.deviations skips batches, which data.packing='online' cannot")

    @property
    def tokens_per_step(self) -> int:
        """Positions of a global batch, padding included."""
        return self.data.batch_sequences * self.data.length_tokens


@dataclasses.dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """`experiments.pretrain`: a causal language model from packed text."""

    model: TransformerConfig = TransformerConfig()
    init_scale: float = 1.0  # of kernels and tables, over the model's own initialisation
    # Length of the run: one of the two.
    total_steps: int | None = None
    total_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_one_given(self, "total_steps", "total_tokens")
        check_ranges(self, size="total_steps", positive="total_tokens init_scale")
        _ = self.num_steps  # raises where they cannot be counted
        if self.data.length_tokens > self.model.max_length_tokens:
            raise ValueError(
                f"data.length_tokens={self.data.length_tokens} exceeds "
                f"model.max_length_tokens={self.model.max_length_tokens}"
            )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        if self.total_steps is not None:
            return self.total_steps
        return as_steps(-(-self.total_tokens // self.tokens_per_step))


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """`experiments.finetune`: a language model taught instructions, or a domain."""

    # A workdir, a Hugging Face directory, a GGUF file, or "smollm2". The model's shape and its
    # tokenizer come from there.
    source: str = ""
    chat_template: str = ""  # a file with Jinja source, in place of the tokenizer's own template
    dropout_rate: float = 0.0
    adapter: AdapterConfig = AdapterConfig()
    trainable: TrainableConfig = TrainableConfig()
    # Length of the run: one of the three.
    total_steps: int | None = None
    total_tokens: int | None = None
    total_epochs: float | None = None  # passes over the packed rows

    def __post_init__(self):
        super().__post_init__()
        check_one_given(self, "total_steps", "total_tokens", "total_epochs")
        check_ranges(
            self, size="total_steps", positive="total_tokens total_epochs", below_one="dropout_rate"
        )
        _check_source(self.source, self.adapter)
        if self.data.tokenizer != TokenizerConfig():
            raise ValueError("data.tokenizer is set: a model keeps the tokenizer of its source")

    def num_steps(self, rows_per_epoch: int) -> int:
        """Steps of the whole run, over data of so many packed rows."""
        if self.total_steps is not None:
            return self.total_steps
        if self.total_tokens is not None:
            return as_steps(-(-self.total_tokens // self.tokens_per_step))
        return as_steps(self.total_epochs * rows_per_epoch / self.data.batch_sequences)


@dataclasses.dataclass(frozen=True)
class ComparisonStageConfig:
    """What the stages that learn from comparisons have in common."""

    source: str = ""  # as FinetuneConfig's
    chat_template: str = ""
    comparisons: ComparisonsConfig = ComparisonsConfig()
    adapter: AdapterConfig = AdapterConfig()
    trainable: TrainableConfig = TrainableConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(name="linear", warmup_steps=10)
    run: RunConfig = RunConfig()
    evaluate_every_steps: int = 100  # on held-out feedback, and at the end; 0: never
    # Length of the run: one of the two.
    total_steps: int | None = None
    total_epochs: float | None = None  # passes over the prompts
    accumulate_steps: int = 1
    seed: int = 0

    def __post_init__(self):
        _check_source(self.source, self.adapter)
        check_one_given(self, "total_steps", "total_epochs")
        check_ranges(
            self, size="total_steps accumulate_steps", positive="total_epochs",
            count="evaluate_every_steps", seed="seed",
        )  # fmt: skip
        batch, parts = self.comparisons.batch_prompts, self.accumulate_steps
        check_multiple("comparisons.batch_prompts", batch, "accumulate_steps", parts)

    def num_steps(self, num_prompts: int) -> int:
        """Steps of the whole run, over so many prompts."""
        if self.total_steps is not None:
            return self.total_steps
        return as_steps(self.total_epochs * num_prompts / self.comparisons.batch_prompts)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a global batch, padding included."""
        each = self.comparisons.max_responses * self.comparisons.length_tokens
        return self.comparisons.batch_prompts * each


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(ComparisonStageConfig):
    """`experiments.reward`: a model that scores responses as people prefer them."""

    dropout_rate: float = 0.0
    tie_threshold: float = 0.0  # nats; 0: ties teach nothing
    calibration_bins: int = 10

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, not_negative="tie_threshold", below_one="dropout_rate",
            within={"calibration_bins": "[1, 999]"},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DirectPreferenceConfig(ComparisonStageConfig):
    """`experiments.preference`: a policy improved on comparisons without a reward model."""

    preference: PreferenceConfig = PreferenceConfig()
    loss_tile_tokens: int = 4096

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, size="loss_tile_tokens")
        if self.preference.method == "kto" and self.comparisons.pad_left:
            raise ValueError("comparisons.pad_left: kto swaps responses, which pads on the right")


@dataclasses.dataclass(frozen=True)
class RlhfConfig:
    """`experiments.rlhf`: a policy improved by policy gradients against rewards."""

    source: str = ""  # of the policy, and of the reference: as FinetuneConfig's
    value_source: str = ""  # a workdir of experiments.reward that the value starts from; "": the
    # policy's trunk and a head of zeros
    prompts: SourceConfig = SourceConfig()
    max_bad_rows: int = 100
    rewards: dict[str, RewardConfig] = dataclasses.field(default_factory=dict)
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    kl: KLConfig = KLConfig()
    ptx: DataConfig = DataConfig()  # read where algorithm.ptx_weight is positive
    adapter: AdapterConfig = AdapterConfig()
    trainable: TrainableConfig = TrainableConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(name="constant")
    run: RunConfig = RunConfig()
    samples_every_steps: int = 20  # responses to the run's logs; 0: never
    num_samples: int = 4
    total_steps: int = 100
    accumulate_steps: int = 1  # parts of a minibatch
    loss_tile_tokens: int = 4096
    seed: int = 0

    def __post_init__(self):
        _check_source(self.source, self.adapter)
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one, e.g. rewards.judge.path")
        check_names(self.rewards, "rewards")
        check_ranges(
            self, seed="seed", count="max_bad_rows samples_every_steps num_samples",
            size="total_steps accumulate_steps loss_tile_tokens",
        )  # fmt: skip
        check_groups(self.rollout, self.algorithm)
        parts = self.algorithm.minibatches * self.accumulate_steps
        of = "algorithm.minibatches × accumulate_steps"
        check_multiple("rollout.prompts × rollout.group", self.responses_per_step, of, parts)
        if self.algorithm.ptx_weight and not self.ptx.sources:
            raise ValueError("algorithm.ptx_weight is positive and ptx.sources is empty")
        if self.algorithm.ptx_weight:
            check_multiple("ptx.batch_sequences", self.ptx.batch_sequences, of, parts)
        check_kl_place(self.kl, self.algorithm)

    @property
    def responses_per_step(self) -> int:
        """Responses that are sampled, scored and learnt from in a step."""
        return self.rollout.prompts * self.rollout.group

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step's responses, padding included."""
        return self.responses_per_step * self.rollout.response_tokens


@dataclasses.dataclass(frozen=True)
class SpeedrunConfig:
    """`experiments.speedrun`: the main job, from raw text to an aligned model and a report.

    Sources of later stages are names of earlier ones: pretrain, sft, reward.
    """

    pretrain: PretrainConfig = PretrainConfig(total_steps=1)
    finetune: FinetuneConfig = FinetuneConfig(source="pretrain", total_steps=1)
    reward: RewardModelConfig = RewardModelConfig(source="sft", total_steps=1)
    preference: DirectPreferenceConfig = DirectPreferenceConfig(source="sft", total_steps=1)
    rlhf: RlhfConfig = RlhfConfig(source="sft", rewards={"reward": RewardConfig(path="reward")})
    judge: JudgeConfig = JudgeConfig()
    num_alignment_samples: int = 4  # responses of each policy in the report
    window_stride_tokens: int = 64  # of the sliding window that held-out text is read through
    ngram_order: int = 5
    prompts: tuple[str, ...] = ("The",)
    samples_per_prompt: int = 2
    sample_tokens: int = 96
    sample_temperature: float = 0.8

    def __post_init__(self):
        check_ranges(
            self, count="num_alignment_samples", not_negative="sample_temperature",
            size="window_stride_tokens samples_per_prompt sample_tokens",
            within={"ngram_order": "[1, 64]"},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """`experiments.scaling`: ladders of runs, the laws fitted to them, and a report."""

    ladders: dict[str, LadderConfig] = dataclasses.field(default_factory=dict)
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()  # of groups of one run; several are spread over the devices
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    num_evaluations: int = 8  # of each run, evenly over its steps
    max_evaluation_sequences: int | None = 128  # held-out rows a source; None: all of them
    accumulate_steps: int = 1
    loss_tile_tokens: int = 4096
    # Of the fits: bootstrap draws, and the share of the runs, those of most FLOPs, that are kept
    # from the fit that is scored on them.
    bootstrap_draws: int = 200
    holdout_fraction: float = 0.2

    def __post_init__(self):
        if not self.ladders:
            raise ValueError("ladders is empty: there is nothing to train")
        check_names(self.ladders, "ladders")
        check_ranges(
            self, count="bootstrap_draws",
            size="num_evaluations max_evaluation_sequences accumulate_steps loss_tile_tokens",
            below_one="holdout_fraction",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EmergenceConfig:
    """`experiments.emergence`: one phenomenon or several; a section that is None is left out."""

    grokking: GrokkingConfig | None = None
    addition: AdditionConfig | None = None
    induction: InductionConfig | None = None
    parity: ParityConfig | None = None
    few_shot: FewShotConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    run: RunConfig = RunConfig()


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """`experiments.sweep`: runs of one stage that differ in some fields, and which was best."""

    stage: Literal["pretrain", "finetune", "reward", "preference", "rlhf"] = "pretrain"
    recipe: str = ""  # of the stage, as its --config
    # {field of the stage's config: value} each; configs/sweep_space.py makes them
    members: tuple[Any, ...] = ()
    shared: tuple[Any, ...] = ()  # likewise, what every member has as well: no part of its name
    metric: str = "train/loss"  # of metrics.jsonl: its last value is what members are compared by
    goal: Literal["min", "max"] = "min"
    executor: Literal["local", "slurm", "skypilot"] = "local"
    local: LocalConfig = LocalConfig()
    slurm: SlurmConfig = SlurmConfig()
    skypilot: SkyPilotConfig = SkyPilotConfig()
    halving: HalvingConfig | None = None  # None: all members run to their end
    cost: CostConfig = CostConfig()

    def __post_init__(self):
        if not self.recipe:
            raise ValueError(
                "recipe is empty: name a recipe of the stage, e.g. configs/depth.py:12"
            )
        if not self.members:
            raise ValueError("members is empty: there is nothing to run")
        for name in ("members", "shared"):
            for each in getattr(self, name):
                if not isinstance(each, dict) or not all(isinstance(field, str) for field in each):
                    raise ValueError(f"{name} has {shown(each)}: each is a dict of field: value")
