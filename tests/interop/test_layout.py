"""The letters of a row, and where layers live in our tree."""

import dataclasses

import numpy as np
import pytest

from llm.interop.families import family_of
from llm.interop.layout import axis_sizes, flat_shapes, load_params, read_param, rearrange, tensors
from llm.interop.weight_tables import GGUF_LLAMA_ROWS, LLAMA_ROWS
from llm.models.config import TransformerConfig
from llm.models.presets import PRESETS, from_depth


def test_rearrange_splits_joined_axes_and_moves_them():
    sizes = {"N": 2, "H": 3, "D": 2, "h": 2, "r": 2}
    # rows are heads × head width; columns the model's width
    array = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]])
    expected = [[[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]]]
    np.testing.assert_array_equal(rearrange(array, "(NH)D", "DNH", sizes), expected)
    np.testing.assert_array_equal(rearrange(np.array(expected), "DNH", "(NH)D", sizes), array)
    # a head of width 4 whose pairs (0,2) and (1,3) stand side by side: 0 2 1 3
    np.testing.assert_array_equal(
        rearrange(np.array([0, 2, 1, 3, 10, 12, 11, 13]), "(Nhr)", "N(rh)", sizes),
        [[0, 1, 2, 3], [10, 11, 12, 13]],
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("gpt2-124m", "gpt2"),
        ("gpt3-175b", "gpt2"),
        ("llama2-7b", "llama"),
        ("llama3-70b", "llama"),
        ("smollm2-135m", "llama"),
        ("qwen3-0.6b", "qwen3"),
    ],
)
def test_every_published_preset_has_a_family(name, family):
    assert family_of(PRESETS[name]) == family


def test_our_own_depth_models_have_a_family():
    assert family_of(from_depth(2, vocab_size=97, max_length_tokens=32)) == "apertus"


def test_names_and_shapes_of_qwen3_are_those_of_its_release():
    found = {t.name: t.shape for t in tensors(LLAMA_ROWS, PRESETS["qwen3-0.6b"])}
    # Qwen/Qwen3-0.6B, model.safetensors: 310 tensors without the repeated head
    assert len(found) == 2 + 28 * 11
    assert found["model.embed_tokens.weight"] == (151936, 1024)
    assert found["model.layers.27.self_attn.q_proj.weight"] == (2048, 1024)
    assert found["model.layers.0.self_attn.k_norm.weight"] == (128,)


def test_layers_of_a_prefix_and_a_longer_cycle_go_to_their_places():
    config = TransformerConfig(
        vocab_size=5,
        width=2,
        num_layers=5,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        mlp_width=3,
        prefix_layers=("global",),
        cycle_layers=("local", "global"),
        sliding_window_tokens=4,
        vocab_multiple=4,
    )
    found = tensors(LLAMA_ROWS, config)
    values = {t.name: np.full(t.shape, i, np.float32) for i, t in enumerate(found)}
    shapes = {name: value.shape for name, value in values.items()}
    params = load_params(LLAMA_ROWS, config, shapes, values.get, "test")
    norm = [values[f"model.layers.{i}.input_layernorm.weight"][0] for i in range(5)]
    scale = lambda layer: layer["attention_norm"]["scale"][..., 0]  # noqa: E731
    assert scale(params["prefix_0"]) == norm[0]
    assert list(scale(params["cycle"]["layer_0"])) == [norm[1], norm[3]]
    assert list(scale(params["cycle"]["layer_1"])) == [norm[2], norm[4]]
    assert params["embedder"]["embedding"].shape == (8, 2)
    assert not params["embedder"]["embedding"][5:].any()
    for tensor in found:
        np.testing.assert_array_equal(read_param(tensor, config, params), values[tensor.name])


def test_a_model_with_parameters_that_the_table_lacks_is_refused():
    config = dataclasses.replace(PRESETS["smollm2-135m"], qk_norm=True)
    with pytest.raises(ValueError, match="no place for these.*attention/query_norm/scale"):
        tensors(GGUF_LLAMA_ROWS, config)


def test_axis_sizes_give_the_true_vocabulary_and_shapes_the_padded_one():
    assert axis_sizes(PRESETS["gpt2-124m"])["V"] == 50257
    assert flat_shapes(PRESETS["gpt2-124m"])["embedder/embedding"] == (50304, 768)
