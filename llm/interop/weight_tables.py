"""Which tensor of a file is which parameter of ours: one table a naming scheme. Interop floor.

A row reads: their name, its axes, our path, its axes; letters as in DESIGN.md (see layout.Row).
"""

import dataclasses

from llm.interop.layout import Row

LLAMA_ROWS = (
    # theirs, its axes, ours, its axes
    Row("model.embed_tokens.weight", "VD", "embedder/embedding", "VD"),
    Row("model.layers.{layer}.input_layernorm.weight", "D", "attention_norm/scale", "D"),
    Row("model.layers.{layer}.self_attn.q_proj.weight", "(NH)D", "attention/query/kernel", "DNH"),
    Row("model.layers.{layer}.self_attn.q_proj.bias", "(NH)", "attention/query/bias", "NH"),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "(KH)D", "attention/key/kernel", "DKH"),
    Row("model.layers.{layer}.self_attn.k_proj.bias", "(KH)", "attention/key/bias", "KH"),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "(KH)D", "attention/value/kernel", "DKH"),
    Row("model.layers.{layer}.self_attn.v_proj.bias", "(KH)", "attention/value/bias", "KH"),
    Row("model.layers.{layer}.self_attn.q_norm.weight", "H", "attention/query_norm/scale", "H"),
    Row("model.layers.{layer}.self_attn.k_norm.weight", "H", "attention/key_norm/scale", "H"),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "D(NH)", "attention/out/kernel", "NHD"),
    Row("model.layers.{layer}.self_attn.o_proj.bias", "D", "attention/out/bias", "D"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "D", "mlp_norm/scale", "D"),
    Row("model.layers.{layer}.mlp.gate_proj.weight", "FD", "mlp/gate/kernel", "DF"),
    Row("model.layers.{layer}.mlp.gate_proj.bias", "F", "mlp/gate/bias", "F"),
    Row("model.layers.{layer}.mlp.up_proj.weight", "FD", "mlp/up/kernel", "DF"),
    Row("model.layers.{layer}.mlp.up_proj.bias", "F", "mlp/up/bias", "F"),
    Row("model.layers.{layer}.mlp.down_proj.weight", "DF", "mlp/down/kernel", "FD"),
    Row("model.layers.{layer}.mlp.down_proj.bias", "D", "mlp/down/bias", "D"),
    Row("model.norm.weight", "D", "final_norm/scale", "D"),
    Row("lm_head.weight", "VD", "head/kernel", "DV"),
)

_MOE = "model.layers.{layer}.mlp"
QWEN3_MOE_ROWS = (
    *LLAMA_ROWS,
    Row(_MOE + ".gate.weight", "ED", "mlp/router/scores/kernel", "DE"),
    Row(_MOE + ".experts.{expert}.gate_proj.weight", "fD", "mlp/experts/gate/kernel", "Df"),
    Row(_MOE + ".experts.{expert}.up_proj.weight", "fD", "mlp/experts/up/kernel", "Df"),
    Row(_MOE + ".experts.{expert}.down_proj.weight", "Df", "mlp/experts/down/kernel", "fD"),
)

_SPARSE = "model.layers.{layer}.block_sparse_moe"
MIXTRAL_ROWS = (
    *(row for row in LLAMA_ROWS if ".mlp." not in row.theirs),
    Row(_SPARSE + ".gate.weight", "ED", "mlp/router/scores/kernel", "DE"),
    Row(_SPARSE + ".experts.{expert}.w1.weight", "fD", "mlp/experts/gate/kernel", "Df"),
    Row(_SPARSE + ".experts.{expert}.w3.weight", "fD", "mlp/experts/up/kernel", "Df"),
    Row(_SPARSE + ".experts.{expert}.w2.weight", "Df", "mlp/experts/down/kernel", "fD"),
)

_FUSED = ("attention/query", "attention/key", "attention/value")

GPT2_ROWS = (
    Row("transformer.wte.weight", "VD", "embedder/embedding", "VD"),
    Row("transformer.wpe.weight", "TD", "position_embedder/embedding", "TD"),
    Row("transformer.h.{layer}.ln_1.weight", "D", "attention_norm/scale", "D"),
    Row("transformer.h.{layer}.ln_1.bias", "D", "attention_norm/bias", "D"),
    Row(
        "transformer.h.{layer}.attn.c_attn.weight",
        "D(NH)",
        tuple(f"{path}/kernel" for path in _FUSED),
        "DNH",
    ),
    Row(
        "transformer.h.{layer}.attn.c_attn.bias",
        "(NH)",
        tuple(f"{path}/bias" for path in _FUSED),
        "NH",
    ),
    Row("transformer.h.{layer}.attn.c_proj.weight", "(NH)D", "attention/out/kernel", "NHD"),
    Row("transformer.h.{layer}.attn.c_proj.bias", "D", "attention/out/bias", "D"),
    Row("transformer.h.{layer}.ln_2.weight", "D", "mlp_norm/scale", "D"),
    Row("transformer.h.{layer}.ln_2.bias", "D", "mlp_norm/bias", "D"),
    Row("transformer.h.{layer}.mlp.c_fc.weight", "DF", "mlp/up/kernel", "DF"),
    Row("transformer.h.{layer}.mlp.c_fc.bias", "F", "mlp/up/bias", "F"),
    Row("transformer.h.{layer}.mlp.c_proj.weight", "FD", "mlp/down/kernel", "FD"),
    Row("transformer.h.{layer}.mlp.c_proj.bias", "D", "mlp/down/bias", "D"),
    Row("transformer.ln_f.weight", "D", "final_norm/scale", "D"),
    Row("transformer.ln_f.bias", "D", "final_norm/bias", "D"),
    Row("lm_head.weight", "VD", "head/kernel", "DV"),
)

# Apertus is Llama but for two names, qk-norm, and a feed-forward block without a gate.
_APERTUS_NAMES = {"input_layernorm": "attention_layernorm"}
_APERTUS_NAMES |= {"post_attention_layernorm": "feedforward_layernorm"}
APERTUS_ROWS = tuple(
    dataclasses.replace(row, theirs=row.theirs.replace(name, _APERTUS_NAMES.get(name, name)))
    for row in LLAMA_ROWS
    for name in [row.theirs.split(".")[-2]]
)

# llama.cpp stores the rows of Q and K with rotary pairs side by side, (h r) where ours are (r h).
GGUF_LLAMA_ROWS = (
    Row("token_embd.weight", "VD", "embedder/embedding", "VD"),
    Row("blk.{layer}.attn_norm.weight", "D", "attention_norm/scale", "D"),
    Row("blk.{layer}.attn_q.weight", "(Nhr)D", "attention/query/kernel", "DN(rh)"),
    Row("blk.{layer}.attn_q.bias", "(Nhr)", "attention/query/bias", "N(rh)"),
    Row("blk.{layer}.attn_k.weight", "(Khr)D", "attention/key/kernel", "DK(rh)"),
    Row("blk.{layer}.attn_k.bias", "(Khr)", "attention/key/bias", "K(rh)"),
    Row("blk.{layer}.attn_v.weight", "(KH)D", "attention/value/kernel", "DKH"),
    Row("blk.{layer}.attn_v.bias", "(KH)", "attention/value/bias", "KH"),
    Row("blk.{layer}.attn_output.weight", "D(NH)", "attention/out/kernel", "NHD"),
    Row("blk.{layer}.attn_output.bias", "D", "attention/out/bias", "D"),
    Row("blk.{layer}.ffn_norm.weight", "D", "mlp_norm/scale", "D"),
    Row("blk.{layer}.ffn_gate.weight", "FD", "mlp/gate/kernel", "DF"),
    Row("blk.{layer}.ffn_gate.bias", "F", "mlp/gate/bias", "F"),
    Row("blk.{layer}.ffn_up.weight", "FD", "mlp/up/kernel", "DF"),
    Row("blk.{layer}.ffn_up.bias", "F", "mlp/up/bias", "F"),
    Row("blk.{layer}.ffn_down.weight", "DF", "mlp/down/kernel", "FD"),
    Row("blk.{layer}.ffn_down.bias", "D", "mlp/down/bias", "D"),
    Row("output_norm.weight", "D", "final_norm/scale", "D"),
    Row("output.weight", "VD", "head/kernel", "DV"),
)
