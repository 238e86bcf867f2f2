"""What a Hugging Face directory may lack or get wrong, and what our errors say of it."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llm.interop.huggingface import load_huggingface, save_huggingface
from llm.interop.weights import load_weights
from llm.models.config import TransformerConfig
from llm.models.presets import PRESETS
from llm.models.transformer import Transformer, logical_axes, param_shapes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings

CONFIG = TransformerConfig(
    vocab_size=97,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=20,
    max_length_tokens=32,
)


def random_params(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, param_shapes(Transformer(config)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "model"
    save_huggingface(directory, CONFIG, random_params(CONFIG), max_shard_bytes=6_000)
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    """A copy to change: as others' directories are, without a ledger that would notice."""
    ours = shutil.ignore_patterns("ledger.json")
    return pathlib.Path(shutil.copytree(exported, tmp_path / "copy", ignore=ours))


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard_of(directory, tensor):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def load_error(directory, kind=ValueError):
    with pytest.raises(kind) as caught:
        load_huggingface(directory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba2"}, "'mamba2' is not supported; supported: gpt2, llama, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supp"),
        ({"rope_scaling": {"rope_type": "linear"}}, "the key 'factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; supported: silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"num_attention_heads": "two"}, "a value is of the wrong type"),
        ({"num_attention_heads": 3}, "hidden_size=16 is not a multiple of num_attention_heads=3"),
        ({"model_type": "gpt2"}, "the key 'n_embd' is missing"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False is not"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "use_sliding_window and sliding_window do not say how wide",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "for each of the 2 layers"),
    ],
)
def test_options_we_do_not_have_are_refused_by_name(copy, values, message):
    change_config(copy, **values)
    with pytest.raises(ValueError, match=message) as caught:
        load_huggingface(copy)
    assert str(caught.value).startswith(str(copy / "config.json"))


def test_missing_unexpected_and_misshapen_tensors_are_named(copy):
    shard = shard_of(copy, "model.norm.weight")
    tensors = safetensors.numpy.load_file(shard)
    assert tensors["model.norm.weight"].shape == (16,)
    index_path = copy / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())

    def rewrite(changed):
        safetensors.numpy.save_file(changed, shard)
        where = {k: v for k, v in index["weight_map"].items() if v != shard.name}
        where |= dict.fromkeys(changed, shard.name)
        index_path.write_text(json.dumps(index | {"weight_map": where}))

    rewrite({k: v for k, v in tensors.items() if k != "model.norm.weight"})
    assert "1 tensors are missing: model.norm.weight" in load_error(copy)
    rewrite(tensors | {"score.weight": np.ones((2, 16), np.float32)})
    assert "1 are unexpected: score.weight" in load_error(copy)
    rewrite(tensors | {"model.norm.weight": np.ones(17, np.float32)})
    message = "tensor model.norm.weight has shape (17,), but its config says (16,)"
    assert message in load_error(copy)
    rewrite(tensors | {"model.norm.weight": np.ones(16, np.int8)})
    assert "model.norm.weight is stored as I8; supported: F64, F32" in load_error(copy)


def test_damaged_files_are_named(copy):
    shard = shard_of(copy, "lm_head.weight")
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\xff" * 8 + whole[8:], b""):
        shard.write_bytes(damaged)
        message = load_error(copy)
        assert f"{shard} is damaged or no safetensors file" in message
    shard.unlink()
    assert f"names {shard.name}, which is not there" in load_error(copy, FileNotFoundError)
    (copy / "model.safetensors.index.json").write_text("[]")
    assert "index.json holds a list; it must hold a JSON object" in load_error(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "is not an index of safetensors files" in load_error(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    assert "which is not in its directory" in load_error(copy)
    (copy / "config.json").write_text("{")
    assert "config.json is not JSON" in load_error(copy)
    (copy / "config.json").unlink()
    assert "it has no config.json" in load_error(copy, FileNotFoundError)


def test_pickled_weights_are_refused_with_the_remedy(copy):
    for path in copy.glob("model*"):
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin, a pickle" in load_error(copy, FileNotFoundError)


def test_files_of_the_bare_model_and_old_buffers_load(tmp_path):
    """The hub's GPT-2: names without "transformer.", attention masks beside the weights."""
    config = dataclasses.replace(
        PRESETS["gpt2-124m"],
        vocab_size=97,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=64,
        max_length_tokens=12,
    )
    params = random_params(config)
    save_huggingface(tmp_path / "gpt2", config, params)
    path = tmp_path / "gpt2" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 12, 12), np.float32) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    safetensors.numpy.save_file(tensors, path)
    (path.parent / "ledger.json").unlink()
    loaded = load_weights(tmp_path / "gpt2")
    assert loaded.config == config
    params["embedder"]["embedding"][97:] = 0.0
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_bfloat16_export_rounds_each_weight_once(tmp_path):
    params = random_params(CONFIG)
    save_huggingface(tmp_path / "model", CONFIG, params, dtype="bfloat16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_huggingface(tmp_path / "model").params
    kernel = params["head"]["kernel"][:, :97]
    expected = kernel.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded["head"]["kernel"][:, :97], expected)
    assert not loaded["head"]["kernel"][:, 97:].any()


def test_sharded_device_arrays_are_exported_like_host_arrays(exported, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params, axes = random_params(CONFIG), logical_axes(Transformer(CONFIG))
    params = jax.device_put(params, make_shardings(mesh, axes, params))
    assert len(params["head"]["kernel"].sharding.device_set) == 8
    save_huggingface(tmp_path / "model", CONFIG, params)
    ours, theirs = load_huggingface(tmp_path / "model"), load_huggingface(exported)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_files_have_the_permissions_of_any_other_file(exported, tmp_path):
    (tmp_path / "other").write_text("")
    (tmp_path / "folder").mkdir()
    mode = lambda path: path.stat().st_mode  # noqa: E731
    assert {mode(path) for path in exported.iterdir()} == {mode(tmp_path / "other")}
    assert mode(exported) == mode(tmp_path / "folder")


def test_no_shard_exceeds_its_limit(exported):
    sizes = {path.name: path.stat().st_size for path in exported.glob("*.safetensors")}
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == sizes.keys() and len(sizes) > 3
    for name in sizes:
        arrays = safetensors.numpy.load_file(exported / name)
        total = sum(array.nbytes for array in arrays.values())
        assert total <= 6_000 or len(arrays) == 1


def test_a_model_that_no_family_has_is_refused_with_what_each_would_need(tmp_path):
    config = dataclasses.replace(CONFIG, qk_norm=True, mlp_bias=True)
    with pytest.raises(ValueError, match="no Hugging Face family has this model") as caught:
        save_huggingface(tmp_path / "model", config, random_params(config))
    assert "qwen3 would need mlp_bias=False" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_params_of_another_config_are_refused(tmp_path):
    params = random_params(CONFIG)
    other = dataclasses.replace(CONFIG, mlp_width=24, tied_head=True)
    with pytest.raises(ValueError, match="head/kernel is .16, 128., config says absent"):
        save_huggingface(tmp_path / "model", other, params)


def test_an_existing_directory_is_left_alone(exported):
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_huggingface(exported, CONFIG, random_params(CONFIG))


def test_nothing_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="a .gguf file, or smollm2"):
        load_weights(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_weights(tmp_path)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_mups_multipliers_are_exported_in_the_weights(tmp_path, qk_norm):
    ours = dataclasses.replace(CONFIG, mup_base_width=4, mup_base_head_dim=2, qk_norm=qk_norm)
    params = random_params(ours)
    save_huggingface(tmp_path / "model", ours, params)
    loaded = load_huggingface(tmp_path / "model")
    assert loaded.config.width_ratio is None
    tokens = jax.numpy.arange(12)[None]
    logits = Transformer(ours).apply({"params": params}, tokens)
    np.testing.assert_allclose(
        Transformer(loaded.config).apply({"params": loaded.params}, tokens),
        logits,
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_tied_head_cannot_hold_mups_multiplier(tmp_path):
    tied = dataclasses.replace(CONFIG, mup_base_width=4, tied_head=True)
    with pytest.raises(ValueError, match="tied_head=False"):
        save_huggingface(tmp_path / "model", tied, random_params(tied))
    assert not (tmp_path / "model").exists()
