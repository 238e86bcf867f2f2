"""SmolLM2-135M-Instruct from its package: the right loss, the right capital, the right tokens."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from llm.data.packages import PackageError, smollm2_file
from llm.interop.huggingface import load_huggingface, save_huggingface
from llm.interop.weights import load_weights
from llm.models.config import ComputeConfig
from llm.models.presets import PRESETS
from llm.models.transformer import Transformer

PASSAGE = """\
Water covers about seventy percent of the surface of the Earth, and most of it is in the oceans. \
When the sun warms the sea, some of the water evaporates and rises into the air as an invisible \
gas. High above the ground the air is cold, and the gas turns back into tiny drops of water, \
which gather into clouds. When the drops become too heavy, they fall as rain or snow. Some of \
this water soaks into the soil, where plants take it up through their roots. Some of it runs into \
streams and rivers, which carry it back to the sea, and the whole journey begins again.

People have depended on this cycle for thousands of years. The first large towns grew beside \
rivers, because farmers needed water for their fields and traders needed boats to move their \
goods. In many places the river flooded once a year and left behind a layer of rich, dark mud in \
which wheat and barley grew well. In other places it hardly ever rained, and the people learned \
to dig canals and to store water behind walls of earth and stone. Today a single dam can hold \
enough water for several million people, but the old problem has not gone away: there is often \
too much water where nobody wants it, and too little where everybody does.
"""
TEXTS = [
    "The capital of France is",
    "In 2024 there were 1234567 people, weren't there?",
    "Ünïcode 漢字 \n\t x  y ",
    "def f(x):\n    return x**2\n",
]
LENGTH = 272


@pytest.fixture(scope="module")
def smollm2():
    try:
        smollm2_file()
    except PackageError as error:
        pytest.skip(f"the package cannot be fetched: {error}")
    return load_weights("smollm2")


@pytest.fixture(scope="module")
def forward(smollm2):
    """(params, ids) → logits of the ids; one compilation for all lengths."""
    model = Transformer(smollm2.config, ComputeConfig(unroll_layers=False))
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))

    def run(params, ids):
        assert len(ids) <= LENGTH
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(apply(params, row))[0, : len(ids)]

    return run


@pytest.fixture(scope="module")
def params(smollm2):
    return jax.device_put(smollm2.params)


def nats_per_token(logits, ids):
    log_probs = jax.nn.log_softmax(logits[:-1])
    return -float(np.take_along_axis(log_probs, np.array(ids[1:])[:, None], axis=-1).mean())


def test_config_is_the_preset_and_the_count_the_published_one(smollm2):
    assert smollm2.config == PRESETS["smollm2-135m"]
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008


def test_plain_english_costs_about_2_85_nats_a_token(smollm2, forward, params):
    ids = smollm2.tokenizer.encode(PASSAGE)
    loss = nats_per_token(forward(params, ids), ids)
    assert loss == pytest.approx(2.85, abs=0.25)

    # with Q and K rows left as the file has them (rotary pairs interleaved) it must be far worse
    wrong = jax.tree.map(lambda leaf: leaf, params)
    attention = wrong["cycle"]["layer_0"]["attention"]
    for name in ("query", "key"):
        kernel = attention[name]["kernel"]
        halves = kernel.reshape(*kernel.shape[:-1], 2, -1)
        attention[name] = {"kernel": halves.swapaxes(-1, -2).reshape(kernel.shape)}
    assert nats_per_token(forward(wrong, ids), ids) > loss + 1.5


def test_the_capital_of_france_is_paris(smollm2, forward, params):
    ids = smollm2.tokenizer.encode("The capital of France is")
    for _ in range(2):
        ids.append(int(forward(params, ids)[-1].argmax()))
    assert smollm2.tokenizer.decode(ids) == "The capital of France is Paris."


def test_tokens_are_those_of_transformers_reading_the_same_file(smollm2):
    path = smollm2_file()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = smollm2.tokenizer.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert smollm2.tokenizer.decode(ids) == text
    assert (smollm2.tokenizer.bos_id, smollm2.tokenizer.eos_id) == (1, 2)
    assert smollm2.tokenizer.vocab_size == 49_152


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    save_huggingface(directory, smollm2.config, smollm2.params, smollm2.tokenizer, dtype="bfloat16")
    return directory


def test_exported_tokenizer_and_chat_template_work_in_transformers(smollm2, exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == smollm2.tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hi!"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smollm2.tokenizer.render_chat(messages, add_generation_prompt=True) == expected
    assert expected.endswith("<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n")


def test_export_scores_the_same_in_transformers_and_here(smollm2, exported, forward):
    again = load_huggingface(exported)
    assert again.config == smollm2.config
    assert again.tokenizer.digest == smollm2.tokenizer.digest
    reference = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert (reference.config.bos_token_id, reference.config.eos_token_id) == (1, 2)
    ids = again.tokenizer.encode(PASSAGE)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    logits = forward(again.params, ids)
    np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=0)  # logits of up to 30
    assert nats_per_token(logits, ids) == pytest.approx(nats_per_token(expected, ids), abs=1e-5)


@pytest.mark.long
def test_evaluate_scores_a_file_as_transformers_does(exported, tmp_path):
    """No <|im_start|> before the text, though it is this tokenizer's BOS, and no EOS after it."""
    (tmp_path / "passage.txt").write_text(PASSAGE)
    command = [sys.executable, "-m", "experiments.evaluate", f"--model={exported}", "--json"]
    command += [f"--text={tmp_path / 'passage.txt'}", "--length_tokens=512"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    ids = transformers.AutoTokenizer.from_pretrained(exported)(PASSAGE, return_tensors="pt")
    reference = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        expected = float(reference(**ids, labels=ids["input_ids"]).loss)
    assert report["loss_nats_per_token"] == pytest.approx(expected, abs=1e-4)
    assert report["tokens"] == ids["input_ids"].shape[1] - 1
    assert report["bytes"] == len(PASSAGE.encode()) - len("Water")
