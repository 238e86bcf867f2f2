"""config.json of Llama and its kin, there and back: Qwen, Apertus, and those with experts.
Interop floor."""

from llm.interop.layer_kinds import count_layers, fold, windows
from llm.interop.rope import rope_from_huggingface, rope_to_huggingface
from llm.models.config import TransformerConfig
from llm.parallel.checks import shown

_GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
_UNGATED_ACTIVATIONS = {"relu2": "relu_squared", "gelu_new": "gelu_tanh", "gelu": "gelu"}


def _llama_like(
    theirs: dict, activations: dict[str, str] = _GATED_ACTIVATIONS, **fields
) -> TransformerConfig:
    width, num_heads = theirs["hidden_size"], theirs["num_attention_heads"]
    kinds = fields.pop("kinds", None) or ("global",) * count_layers(theirs)
    prefix, cycle = fold(kinds)
    fields = dict(head_dim=theirs.get("head_dim") or width // num_heads) | fields
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        width=width,
        num_layers=theirs["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=theirs.get("num_key_value_heads") or num_heads,
        mlp_width=theirs["intermediate_size"],
        max_length_tokens=theirs["max_position_embeddings"],
        norm_epsilon=theirs.get("rms_norm_eps", 1e-6),
        activation=choose(theirs, "hidden_act", "silu", activations),
        tied_head=theirs.get("tie_word_embeddings", False),
        prefix_layers=prefix,
        cycle_layers=cycle,
        **rope_from_huggingface(theirs),
        **fields,
    )


def llama_to_ours(theirs: dict) -> TransformerConfig:
    width, num_heads = theirs["hidden_size"], theirs["num_attention_heads"]
    if width % num_heads:  # transformers refuses such a Llama, whatever its head_dim
        raise ValueError(
            f"hidden_size={width} is not a multiple of num_attention_heads={num_heads}"
        )
    return _llama_like(
        theirs,
        attention_bias="all" if theirs.get("attention_bias", False) else "none",
        mlp_bias=theirs.get("mlp_bias", False),
    )


def qwen2_to_ours(theirs: dict) -> TransformerConfig:
    return _llama_like(theirs, attention_bias="qkv", **windows(theirs))


def qwen3_to_ours(theirs: dict) -> TransformerConfig:
    return _llama_like(
        theirs,
        # unlike Llama's, Qwen3's default head width does not follow from the model's
        head_dim=theirs.get("head_dim") or 128,
        attention_bias="all" if theirs.get("attention_bias", False) else "none",
        qk_norm=True,
        **windows(theirs),
    )


def apertus_to_ours(theirs: dict) -> TransformerConfig:
    if not (theirs.get("rope_parameters") or theirs.get("rope_scaling")):
        raise ValueError("the rotary settings are missing: give rope_parameters")
    return _llama_like(
        theirs,
        _UNGATED_ACTIVATIONS,
        attention_bias="all" if theirs.get("attention_bias", False) else "none",
        qk_norm=True,
    )


def mixtral_to_ours(theirs: dict) -> TransformerConfig:
    theirs = {"num_experts_per_tok": 2, "num_local_experts": 8, "rms_norm_eps": 1e-5} | theirs
    window = theirs.get("sliding_window")
    kind = "local_moe" if window else "global_moe"
    return _llama_like(
        theirs,
        kinds=(kind,) * count_layers(theirs),
        sliding_window_tokens=window or None,
        num_experts=theirs["num_local_experts"],
        experts_per_token=theirs["num_experts_per_tok"],
        expert_mlp_width=theirs["intermediate_size"],
    )


def qwen3_moe_to_ours(theirs: dict) -> TransformerConfig:
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", False) else None
    attention = "local" if window else "global"  # all layers alike, whatever layer_types says
    dense, each = theirs.get("mlp_only_layers") or (), theirs.get("decoder_sparse_step", 1)
    kinds = tuple(
        attention if i in dense or (i + 1) % each else f"{attention}_moe"
        for i in range(count_layers(theirs))
    )
    # transformers 5 has both names
    num_experts = theirs.get("num_experts") or theirs.get("num_local_experts", 128)
    experts = dict(
        num_experts=num_experts,
        experts_per_token=theirs.get("num_experts_per_tok", 8),
        expert_mlp_width=theirs["moe_intermediate_size"],
        router_renormalise=theirs.get("norm_topk_prob", False),
    )
    return _llama_like(
        theirs,
        kinds=kinds,
        sliding_window_tokens=window,
        attention_bias="all" if theirs.get("attention_bias", False) else "none",
        qk_norm=True,
        **(experts if any(kind.endswith("_moe") for kind in kinds) else {}),
    )


def llama_to_theirs(config: TransformerConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length_tokens,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": first_key(_GATED_ACTIVATIONS, config.activation),
        "attention_bias": config.attention_bias != "none",
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied_head,
        **rope_to_huggingface(config),
    }


def qwen_to_theirs(config: TransformerConfig) -> dict:
    kinds = tuple(kind.removesuffix("_moe") for kind in config.layer_kinds)
    names = {"global": "full_attention", "local": "sliding_attention"}
    theirs = llama_to_theirs(config)
    del theirs["mlp_bias"]  # Qwen has none
    return theirs | {
        "use_sliding_window": "local" in kinds,
        "sliding_window": config.sliding_window_tokens if "local" in kinds else None,
        # older readers know only "full attention below this layer, sliding from it on"
        "max_window_layers": kinds.index("local") if "local" in kinds else len(kinds),
        "layer_types": [names[kind] for kind in kinds],
    }


def apertus_to_theirs(config: TransformerConfig) -> dict:
    theirs = llama_to_theirs(config)
    del theirs["mlp_bias"]  # Apertus has none
    return theirs | {"hidden_act": first_key(_UNGATED_ACTIVATIONS, config.activation)}


def mixtral_to_theirs(config: TransformerConfig) -> dict:
    theirs = llama_to_theirs(config)
    del theirs["mlp_bias"], theirs["attention_bias"]  # Mixtral has none
    return theirs | {
        "intermediate_size": config.expert_mlp_width,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": _window(config),
    }


def qwen3_moe_to_theirs(config: TransformerConfig) -> dict:
    theirs = llama_to_theirs(config)
    del theirs["mlp_bias"]
    window = _window(config)
    kinds = enumerate(config.layer_kinds)
    return theirs | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "mlp_only_layers": [i for i, kind in kinds if not kind.endswith("_moe")],
        "decoder_sparse_step": 1,
        "moe_intermediate_size": config.expert_mlp_width,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.router_renormalise,
    }


def _window(config: TransformerConfig) -> int | None:
    """Return the window of all layers, where all have one."""
    local = all(kind.startswith("local") for kind in config.layer_kinds)
    return config.sliding_window_tokens if local else None


def choose(theirs: dict, key: str, default: str, choices: dict[str, str]) -> str:
    value = theirs.get(key, default)
    if value not in choices:
        raise ValueError(f"{key}={shown(value)} is not supported; supported: {', '.join(choices)}")
    return choices[value]


def first_key(choices: dict[str, str], value: str) -> str:
    """Return their name of our activation; of one they lack, any (family_of will then refuse)."""
    return next((key for key, ours in choices.items() if ours == value), next(iter(choices)))


def require_values(theirs: dict, **values) -> None:
    for key, value in values.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{key}={shown(theirs[key])} is not supported; only {value!r} is")
