"""experiments.convert as a user runs it: a directory to a workdir and back, nothing lost."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments.loading import load_model
from llm.data.tokenizer_training import byte_tokenizer
from llm.interop.huggingface import load_huggingface, save_huggingface
from llm.models.config import ComputeConfig
from llm.models.presets import from_depth
from llm.models.transformer import Transformer, init_params
from llm.training.digests import tree_digest
from llm.training.manifests import read_ledger


def convert(*arguments):
    command = [sys.executable, "-m", "experiments.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    tokenizer = byte_tokenizer()
    config = from_depth(1, vocab_size=tokenizer.vocab_size, max_length_tokens=32)
    params = init_params(Transformer(config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.02, params)  # residual outputs start at zero
    directory = tmp_path_factory.mktemp("convert") / "huggingface"
    save_huggingface(directory, config, params, tokenizer)
    return directory


def test_a_model_survives_the_way_through_a_workdir(exported, tmp_path):
    workdir, back = tmp_path / "workdir", tmp_path / "back"
    made = convert(f"--source={exported}", f"--target={workdir}")
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == f"{exported} → {workdir} (workdir)"
    original, ours = load_huggingface(exported), load_model(str(workdir))
    assert ours.config == original.config
    assert ours.tokenizer.digest == original.tokenizer.digest
    jax.tree.map(np.testing.assert_array_equal, ours.params, original.params)

    made = convert(f"--source={workdir}", f"--target={back}", "--max_shard_bytes=50000")
    assert made.returncode == 0, made.stderr
    assert (back / "model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    ids = tokenizer("Grüße!", add_special_tokens=False)["input_ids"]
    assert ids == ours.tokenizer.encode("Grüße!")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    logits = Transformer(ours.config, ComputeConfig()).apply(
        {"params": ours.params}, jnp.array([ids])
    )
    vocab = ours.config.vocab_size
    np.testing.assert_allclose(logits[..., :vocab], expected, atol=1e-4, rtol=0)


def test_an_export_says_what_it_is_and_refuses_other_weights(exported, tmp_path):
    """The Pythia series shipped another step's weights under 86 of 154 names; these cannot be."""
    workdir, first, second = tmp_path / "workdir", tmp_path / "first", tmp_path / "second"
    assert convert(f"--source={exported}", f"--target={workdir}").returncode == 0
    assert convert(f"--source={workdir}", f"--target={first}").returncode == 0
    origin = json.loads((first / "ledger.json").read_text())["origin"]
    (row,) = read_ledger(workdir)
    assert {"run": "workdir", "ema": False} | row == origin
    assert origin["params_digest"] == tree_digest(load_model(str(workdir)).params)

    changed = load_huggingface(exported)
    params = jax.tree.map(lambda leaf: leaf * 1.01, changed.params)
    save_huggingface(second, changed.config, params, changed.tokenizer)
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    transformers.AutoModelForCausalLM.from_pretrained(first)  # to others nothing is wrong
    with pytest.raises(ValueError, match=r"model.safetensors is not the file .*\(step 0, param"):
        load_model(str(first))
    (first / "tokenizer.json").unlink()
    seen = subprocess.run(
        [sys.executable, "-m", "experiments.inspect", f"--workdir={first}", "--verify", "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    report = json.loads(seen.stdout)
    assert report["origin"] == origin
    damaged, missing = report["problems"]
    assert "model.safetensors is not the file" in damaged and "tokenizer.json is miss" in missing


def test_mistakes_are_one_line(exported, tmp_path):
    def mistake(*arguments):
        result = convert(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr

    assert "exists and is not empty" in mistake(f"--source={exported}", f"--target={exported}")
    nothing = mistake(f"--source={tmp_path / 'nothing'}", f"--target={tmp_path / 'out'}")
    assert "does not exist; give a Hugging Face directory, a .gguf file, or smollm2" in nothing
    assert not (tmp_path / "out").exists()
