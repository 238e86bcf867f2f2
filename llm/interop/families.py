"""The Hugging Face families we read and write: a table of weights, config.json there and back.

`family_of` finds the family that can express one of our models. Interop floor.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from llm.interop.layout import Row
from llm.interop.llama_configs import (
    apertus_to_ours,
    apertus_to_theirs,
    choose,
    first_key,
    llama_to_ours,
    llama_to_theirs,
    mixtral_to_ours,
    mixtral_to_theirs,
    qwen2_to_ours,
    qwen3_moe_to_ours,
    qwen3_moe_to_theirs,
    qwen3_to_ours,
    qwen_to_theirs,
    require_values,
)
from llm.interop.weight_tables import (
    APERTUS_ROWS,
    GPT2_ROWS,
    LLAMA_ROWS,
    MIXTRAL_ROWS,
    QWEN3_MOE_ROWS,
)
from llm.models.config import TransformerConfig
from llm.parallel.checks import shown

# Buffers that older versions of transformers wrote beside the weights.
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type of transformers."""

    architecture: str
    base: str  # prefix that files of the bare model, without its head, leave out
    rows: tuple[Row, ...]
    to_ours: Callable[[dict], TransformerConfig]
    to_theirs: Callable[[TransformerConfig], dict]

    def canonical_names(self, names: list[str], config: TransformerConfig) -> dict[str, str]:
        """Return {name as in `rows`: name in the file} but for buffers and a repeated tied head."""
        bare = not any(name.startswith(self.base) for name in names)
        canonical = {}
        for name in names:
            if _BUFFERS.search(name) or (config.tied_head and name == "lm_head.weight"):
                continue
            add = bare and name != "lm_head.weight"
            canonical[self.base + name if add else name] = name
        return canonical


def config_from_huggingface(theirs: dict) -> TransformerConfig:
    """Return our config from a config.json. Dropout stays 0: it is the training run's choice.

    Raises:
      ValueError: an architecture or an option that our models do not have; a missing key.
    """
    family = family_named(theirs.get("model_type"))
    quantization = theirs.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else "?"
        raise ValueError(f"the weights are quantised ({method}); supported: full-precision weights")
    try:
        ours = family.to_ours(theirs)
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"a value is of the wrong type or size: {text:.300}") from error
    for field in dataclasses.fields(ours):
        if field.type is bool and not isinstance(getattr(ours, field.name), bool):
            value = shown(getattr(ours, field.name))
            raise ValueError(
                f"what becomes model.{field.name} is {value}; it must be true or false"
            )
    return ours


def family_named(model_type: Any) -> Family:
    """Return the family that config.json calls by this model_type.

    Raises:
      ValueError: we do not have it.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {shown(model_type)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_of(config: TransformerConfig) -> str:
    """Return the model_type that can express this config: the first that gives it back unchanged.

    Raises:
      ValueError: none can; says what each family would need to be different.
    """
    reasons, ours = [], dataclasses.asdict(_comparable(config))
    for model_type, family in FAMILIES.items():
        try:
            back = family.to_ours(family.to_theirs(config))
        except ValueError as error:
            reasons.append(f"{model_type}: {error}")
            continue
        theirs = dataclasses.asdict(_comparable(back))
        differing = [f"{key}={theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
        if not differing:
            return model_type
        reasons.append(f"{model_type} would need {', '.join(differing)}")
    raise ValueError("no Hugging Face family has this model. " + "; ".join(reasons))


def _comparable(config: TransformerConfig) -> TransformerConfig:
    """Return the config without what weights do not depend on, unused fields at their defaults."""
    blank = TransformerConfig()
    ignored = ["vocab_multiple", "dropout_rate", "initializer"]
    ignored += ["expert_capacity_factor"]  # what trains with a capacity is served without
    if not config.moe_layers:
        ignored += ["experts_per_token", "expert_mlp_width", "shared_expert_width", "router_scale"]
        ignored += ["router_scores", "router_renormalise"]
    if config.moe_layers == config.num_layers:
        ignored += ["mlp_width"]
    if config.positions != "rotary":
        ignored += ["rope_theta", "rope_scaling"]
    scaling = config.rope_scaling if config.positions == "rotary" else "none"
    if scaling == "none":
        ignored += ["rope_factor"]
    if scaling != "llama3":
        ignored += ["rope_low_frequency_factor", "rope_high_frequency_factor"]
        ignored += ["rope_original_length_tokens"]
    if not any(kind.startswith("local") for kind in config.layer_kinds):
        ignored += ["sliding_window_tokens"]
    unrolled = {"prefix_layers": (), "cycle_layers": config.layer_kinds}
    defaults = {name: getattr(blank, name) for name in ignored}
    return dataclasses.replace(config, **defaults, **unrolled)


# --- GPT-2 ------------------------------------------------------------------------------------

_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu_squared",
}


def _gpt2_to_ours(theirs: dict) -> TransformerConfig:
    require_values(
        theirs,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    width, num_heads = theirs["n_embd"], theirs["n_head"]
    if width % num_heads:
        raise ValueError(f"n_embd={width} is not a multiple of n_head={num_heads}")
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        width=width,
        num_layers=theirs["n_layer"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=theirs.get("n_inner") or 4 * width,
        max_length_tokens=theirs["n_positions"],
        attention_bias="all",
        positions="learned",
        norm="layernorm",
        norm_epsilon=theirs.get("layer_norm_epsilon", 1e-5),
        activation=choose(theirs, "activation_function", "gelu_new", _GPT2_ACTIVATIONS),
        mlp_bias=True,
        tied_head=theirs.get("tie_word_embeddings", True),
    )


def _gpt2_to_theirs(config: TransformerConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length_tokens,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": first_key(_GPT2_ACTIVATIONS, config.activation),
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tied_head,
    }


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", GPT2_ROWS, _gpt2_to_ours, _gpt2_to_theirs),
    "llama": Family("LlamaForCausalLM", "model.", LLAMA_ROWS, llama_to_ours, llama_to_theirs),
    "qwen3": Family("Qwen3ForCausalLM", "model.", LLAMA_ROWS, qwen3_to_ours, qwen_to_theirs),
    "qwen2": Family("Qwen2ForCausalLM", "model.", LLAMA_ROWS, qwen2_to_ours, qwen_to_theirs),
    # the home of our own depth models: qk-norm with a squared ReLU
    "apertus": Family(
        "ApertusForCausalLM", "model.", APERTUS_ROWS, apertus_to_ours, apertus_to_theirs
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "model.", MIXTRAL_ROWS, mixtral_to_ours, mixtral_to_theirs
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "model.", QWEN3_MOE_ROWS, qwen3_moe_to_ours, qwen3_moe_to_theirs
    ),
}
