"""GGUF files written here with the gguf library, read against transformers and against literals."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llm.interop.gguf import load_gguf
from llm.models.config import ComputeConfig
from llm.models.transformer import Transformer

WIDTH, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2
TYPES = gguf.GGMLQuantizationType
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# 256 bytes, then one merge: "a"+"b"; then a control token.
BYTE_TOKENS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))] + [
    chr(256 + i) for i in range(68)
]
TOKENS = [*BYTE_TOKENS, "ab", "<|end|>"]


@pytest.fixture(scope="module")
def torch_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The reordering of rows that llama.cpp's converter applies to Q and K."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, *, kind=TYPES.F32, metadata=(), skip=(), extra=None, pre="smollm"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, array in (gguf_tensors(model) | (extra or {})).items():
        if name in skip:
            continue
        if array.ndim == 1 or kind == TYPES.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model) -> dict[str, np.ndarray]:
    state = {name: p.numpy() for name, p in model.state_dict().items()}
    out = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        for theirs, name in NAMES.items():
            array = state[f"model.layers.{layer}.{theirs}.weight"]
            if name == "attn_q":
                array = interleave(array, HEADS)
            if name == "attn_k":
                array = interleave(array, KV_HEADS)
            out[f"blk.{layer}.{name}.weight"] = array
    return out


def our_logits(checkpoint, tokens):
    model = Transformer(checkpoint.config, ComputeConfig(unroll_layers=False))
    logits = model.apply(
        {"params": jax.tree.map(jnp.asarray, checkpoint.params)}, jnp.asarray(tokens.numpy())
    )
    return np.asarray(logits)[..., : checkpoint.config.vocab_size]


TEXT_TOKENS = torch.arange(40)[None] * 5 % len(TOKENS)


def test_float32_file_gives_the_logits_of_the_model_it_was_made_from(torch_llama, tmp_path):
    checkpoint = load_gguf(write_gguf(tmp_path / "m.gguf", torch_llama))
    assert checkpoint.config.norm_epsilon == 1e-5  # stored as float32: 9.99999974e-06
    with torch.no_grad():
        expected = torch_llama(TEXT_TOKENS).logits
    np.testing.assert_allclose(our_logits(checkpoint, TEXT_TOKENS), expected, atol=1e-4, rtol=0)


# Half a quantisation step, as a share of a block's largest absolute value: Q8_0 has 127 steps to
# each side, Q4_1 15 over the range, Q4_0 8 to one side and 7 to the other (so there a whole one).
STEPS = {
    TYPES.F16: 2**-11,
    TYPES.BF16: 2**-8,
    TYPES.Q8_0: 0.5 / 127,
    TYPES.Q4_1: 0.5 * 2 / 15,
    TYPES.Q4_0: 1 / 8,
}


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_quantised_weights_are_within_a_step_of_the_exact_ones(torch_llama, tmp_path, kind):
    exact = load_gguf(write_gguf(tmp_path / "exact.gguf", torch_llama)).params
    rounded = load_gguf(write_gguf(tmp_path / "rounded.gguf", torch_llama, kind=kind)).params

    def check(ours, expected):
        # the 1% is for the scales, which are stored as float16
        tolerance = 1.01 * STEPS[kind] * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)

    jax.tree.map(check, rounded, exact)
    assert np.any(rounded["head"]["kernel"] != exact["head"]["kernel"])


def test_tokenizer_comes_from_the_metadata(torch_llama, tmp_path):
    tokenizer = load_gguf(write_gguf(tmp_path / "m.gguf", torch_llama)).tokenizer
    # "smollm" splits digits, "ab" is merged, the control token is one id; "!" is the first byte
    end = len(TOKENS) - 1
    assert tokenizer.encode("ab!12") == [TOKENS.index("ab"), 0, 16, 17]
    assert tokenizer.encode("!<|end|>", control=True) == [0, end]
    text = "Ünïcode 漢字 \n\t ab"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.bos_id == end and tokenizer.eos_id == end
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_llama3_rope_divisors_become_the_named_scaling(torch_llama, tmp_path):
    rope = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=16384,
        rope_parameters=dict(rope_type="llama3", rope_theta=10_000.0, factor=32.0, **rope),
    )
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled, _ = compute(config, "cpu")
    plain = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    divisors = (plain / scaled.numpy()).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", torch_llama, extra={"rope_freqs.weight": divisors})
    checkpoint = load_gguf(path)
    assert checkpoint.config.rope_scaling == "llama3"
    assert checkpoint.config.rope_factor == pytest.approx(32.0)

    other = write_gguf(
        tmp_path / "x.gguf", torch_llama, extra={"rope_freqs.weight": divisors[::-1].copy()}
    )
    with pytest.raises(ValueError, match="is not Llama 3's rotary scaling"):
        load_gguf(other)


def test_what_is_not_supported_is_named(torch_llama, tmp_path):
    def error(**options):
        with pytest.raises(ValueError) as caught:
            load_gguf(write_gguf(tmp_path / "m.gguf", torch_llama, **options))
        return str(caught.value)

    assert "'yarn' is not supported; supported: linear" in error(
        metadata=[("llama.rope.scaling.type", "yarn")]
    )
    assert "tokenizer.ggml.pre='viking' is not supported" in error(pre="viking")
    assert "1 tensors are missing: blk.1.attn_k.weight" in error(skip=["blk.1.attn_k.weight"])
    assert "1 are unexpected: blk.0.sinks" in error(extra={"blk.0.sinks": np.ones(4, np.float32)})
    assert "has shape (64,), but its config says (96, 64)" in error(
        extra={"blk.0.ffn_up.weight": np.ones(64, np.float32)}
    )


def test_other_architectures_and_damage_are_named(torch_llama, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "phi.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match="architecture 'phi3' is not supported; supported: 'llama'"
    ):
        load_gguf(tmp_path / "phi.gguf")

    whole = write_gguf(tmp_path / "m.gguf", torch_llama).read_bytes()
    for kept in (0, 2, 30, 3_000, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="cut.gguf is damaged or no GGUF file"):
            load_gguf(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError, match="nowhere.gguf is no file"):
        load_gguf(tmp_path / "nowhere.gguf")
