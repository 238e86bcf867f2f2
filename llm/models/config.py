"""What a transformer is (TransformerConfig) and how it is computed (ComputeConfig). Without JAX."""

import dataclasses
from typing import Literal

from llm.parallel.checks import LARGEST, check_multiple, check_ranges, shown

LAYER_KINDS = ("global", "local", "global_moe", "local_moe")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One transformer. GPT-2, Llama, Qwen and the rest are values of this, not subclasses.

    Layers are `prefix_layers` once, then `cycle_layers` repeated: "global" layers attend to all
    positions that `attention` admits, "local" ones to `sliding_window_tokens` of them. Those named
    "global_moe" and "local_moe" have a mixture of experts for their feed-forward block: Mixtral is
    a cycle ("global_moe",), a DeepSeek has a prefix ("global",) before it.
    """

    vocab_size: int = 50257
    width: int = 768  # D
    num_layers: int = 12  # L
    num_heads: int = 12  # N
    num_kv_heads: int = 12  # K
    head_dim: int = 64  # H
    mlp_width: int = 3072  # F
    max_length_tokens: int = 1024
    prefix_layers: tuple[str, ...] = ()
    cycle_layers: tuple[str, ...] = ("global",)

    attention: Literal["causal", "bidirectional", "prefix"] = "causal"
    sliding_window_tokens: int | None = None
    attention_bias: Literal["none", "qkv", "all"] = "none"
    attention_softcap: float | None = None
    qk_norm: bool = False

    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length_tokens: int = 8192

    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-5
    # "none": layers are attention alone.
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "swiglu", "geglu", "none"] = (
        "swiglu"
    )
    mlp_bias: bool = False
    dropout_rate: float = 0.0

    num_experts: int = 0  # E, in layers of kind global_moe and local_moe
    experts_per_token: int = 0
    expert_mlp_width: int = 0  # F of each expert
    # Of an expert that every token goes through; 0: none. n of them are one of n times the width.
    shared_expert_width: int = 0
    # An expert's score of a token: softmax over the experts, or each expert's own sigmoid.
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    router_renormalise: bool = True  # the chosen experts' scores sum to one
    router_scale: float = 1.0  # of them, then
    # Each expert takes at most this times a sequence's mean load from it; further tokens pass by.
    # None: dropless.
    expert_capacity_factor: float | None = None

    tied_head: bool = False
    head_softcap: float | None = None
    vocab_multiple: int = 128
    # "gpt2": std 0.02, residual outputs / sqrt(2L). "fan_in": 1/sqrt(fan in), residual outputs 0.
    initializer: Literal["gpt2", "fan_in"] = "gpt2"
    # muP: at this width (and head width) it changes nothing, except that Muon then scales matrices
    # that narrow too; a model of another width, whose heads and feed-forward grow as it does,
    # trains best at the same learning rate. See width_ratio.
    mup_base_width: int | None = None
    mup_base_head_dim: int | None = None  # None: heads are as wide as the base's

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: the true vocabulary rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def width_ratio(self) -> float | None:
        """Width over muP's base width; None without muP.

        The head's output is divided by it, and the optimizer's updates as `make_optimizer` says;
        kernels begin with 1/sqrt(ratio) of the base's standard deviation, head and tables with the
        base's; attention's scale goes as 1/H in place of 1/sqrt(H).

        Source: Yang et al. 2022, arXiv:2203.03466, table 8 and definition 4.1.
        """
        return None if self.mup_base_width is None else self.width / self.mup_base_width

    @property
    def num_cycles(self) -> int:
        """How often `cycle_layers` repeats: the length of axis 0 of the stacked parameters."""
        return (self.num_layers - len(self.prefix_layers)) // len(self.cycle_layers)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer, bottom first."""
        return self.prefix_layers + self.cycle_layers * self.num_cycles

    @property
    def moe_layers(self) -> int:
        """The number of layers with experts."""
        return sum(kind.endswith("_moe") for kind in self.layer_kinds)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block multiplies by a gate (three matrices instead of two)."""
        return self.activation in ("swiglu", "geglu")

    def __post_init__(self):
        check_ranges(
            self,
            section="model.",
            layers="num_layers",
            size=(
                "vocab_size width num_heads num_kv_heads head_dim mlp_width "
                "max_length_tokens vocab_multiple sliding_window_tokens "
                "rope_original_length_tokens mup_base_width mup_base_head_dim"
            ),
            count="num_experts experts_per_token expert_mlp_width shared_expert_width",
            positive=(
                "attention_softcap head_softcap rope_theta rope_factor rope_low_frequency_factor "
                "rope_high_frequency_factor router_scale expert_capacity_factor"
            ),
            below_one="dropout_rate",
            within={"norm_epsilon": "(0, 1]"},
        )
        _require(
            self.padded_vocab_size <= LARGEST,
            f"model.vocab_size={self.vocab_size}, rounded up to vocab_multiple="
            f"{self.vocab_multiple}, exceeds {LARGEST}",
        )
        check_multiple("model.num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        for kind in self.prefix_layers + self.cycle_layers:
            _require(
                kind in LAYER_KINDS,
                f"model.prefix_layers or cycle_layers has {shown(kind)}; they are "
                f"{', '.join(LAYER_KINDS)}",
            )
        _require(bool(self.cycle_layers), "model.cycle_layers is empty: give at least ('global',)")
        cycled = self.num_layers - len(self.prefix_layers)
        _require(
            cycled >= 0 and cycled % len(self.cycle_layers) == 0,
            f"model.num_layers={self.num_layers} is not {len(self.prefix_layers)} prefix layers "
            f"plus whole cycles of {len(self.cycle_layers)}",
        )
        _require(
            not any(kind.startswith("local") for kind in self.layer_kinds)
            or self.sliding_window_tokens is not None,
            "local layers need a positive model.sliding_window_tokens",
        )
        _require(
            self.positions != "rotary" or self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim}: rotary positions need an even head width",
        )
        _require(
            self.mup_base_head_dim is None or self.mup_base_width is not None,
            "model.mup_base_head_dim needs mup_base_width",
        )
        _require(
            self.rope_scaling != "llama3"
            or self.rope_low_frequency_factor < self.rope_high_frequency_factor,
            f"model.rope_low_frequency_factor={self.rope_low_frequency_factor} must be below "
            f"rope_high_frequency_factor={self.rope_high_frequency_factor}",
        )
        self._check_experts()

    def _check_experts(self):
        if not self.moe_layers:
            _require(
                not self.num_experts,
                f"model.num_experts={self.num_experts}, but no layer is global_moe or local_moe",
            )
            return
        for name in ("num_experts", "experts_per_token", "expert_mlp_width"):
            _require(
                getattr(self, name) > 0,
                f"model.{name}=0: layers of kind global_moe and local_moe need it positive",
            )
        _require(
            self.experts_per_token <= self.num_experts,
            f"model.experts_per_token={self.experts_per_token} exceeds "
            f"num_experts={self.num_experts}",
        )
        _require(not self.mlp_bias, "model.mlp_bias=True: experts have no biases; set it to False")
        _require(
            self.activation != "none",
            "model.activation='none' leaves out the feed-forward block, which experts are",
        )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA: low-rank factors beside kernels inside layers; and how those kernels are stored.

    Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314 (QLoRA, without
    its double quantisation).
    """

    rank: int = 0  # 0: no factors
    alpha: float = 16.0  # the factors' product counts alpha / rank times
    # Which of query, key, value, out, up, gate, down get factors.
    targets: tuple[str, ...] = ("query", "key", "value", "out", "up", "gate", "down")
    # Storage of all those kernels, then frozen: int8 with a scale an output, or 4-bit NormalFloat
    # with a scale for each block of at most `block` inputs.
    quantize: Literal["none", "int8", "nf4"] = "none"
    block: int = 64

    def __post_init__(self):
        check_ranges(self, section="adapter.", count="rank", positive="alpha", size="block")
        for name in self.targets:
            _require(
                name in ADAPTED,
                f"adapter.targets has {shown(name)}; they are {', '.join(ADAPTED)}",
            )
        _require(
            not self.rank or bool(self.targets), "adapter.targets is empty: nothing would be learnt"
        )


KEPT = "attention"  # how what compute.remat="attention" keeps is called in a traced program
ADAPTED = ("query", "key", "value", "out", "up", "gate", "down")  # kernels inside layers


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a transformer is computed: nothing here changes what it is."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attention_kernel: Literal["auto", "xla", "blocked", "cudnn", "splash"] = "auto"
    remat: Literal["none", "full", "dots", "dots_with_no_batch", "attention"] = "none"
    unroll_layers: bool = True  # faster to run when small; rolled compiles fast at depth
    # With mesh.pipeline > 1: stretches of layers a stage, and parts of a batch that follow each
    # other through the stages (None: two a stage, or one). See llm/models/pipeline.py.
    pipeline_repeats: int = 1
    pipeline_microbatches: int | None = None
    # On GPUs: kernels that give the same bits each time, none chosen by trying them out, as bitwise
    # resumes need. It holds for the whole process. CPUs and TPUs do so anyway.
    deterministic: bool = False

    def __post_init__(self):
        check_ranges(self, section="compute.", size="pipeline_repeats pipeline_microbatches")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
