"""Text in, text out: batches, streams, beginnings and ends."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers

from llm.data.tokenizer_training import byte_tokenizer
from llm.generation.config import SamplingConfig
from llm.generation.generator import Generator, stop_ids
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params
from llm.models.unstack import unstack, unstacked

TOKENIZER = byte_tokenizer()
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length_tokens=64,
)
SAMPLING = SamplingConfig(max_new_tokens=21, temperature=1.0, top_p=0.95)
PROMPTS = ["A", "Die Straße", "猫 and 😀"]


@pytest.fixture(scope="module")
def loud():
    model = Transformer(CONFIG)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return model, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)


def test_a_stream_is_the_same_text_as_a_batch_of_one_in_whole_characters(loud):
    model, params = loud
    generator = Generator(model, TOKENIZER, SAMPLING)
    key = jax.random.key(4)
    for prompt in PROMPTS[:2]:
        ids = generator.encode(prompt)
        [done] = generator.complete(params, [ids], key)
        pieces = list(generator.stream(params, ids, key))
        assert "".join(pieces) == done.text and len(pieces) > 1 and all(pieces)
        assert TOKENIZER.decode(done.tokens, skip_control=True) == done.text
        assert len(done.tokens) == len(done.log_probs) == SAMPLING.max_new_tokens
        assert not done.finished


def test_texts_do_not_depend_on_what_is_generated_beside_them(loud):
    model, params = loud
    generator = Generator(unstacked(model), TOKENIZER, SAMPLING)
    params = unstack(model, params)
    texts = generator(params, PROMPTS, jax.random.key(1))
    assert generator(params, PROMPTS[:2], jax.random.key(1)) == texts[:2]
    assert len(set(texts)) == 3


def test_a_turns_end_stops_the_text_and_is_no_part_of_it(loud):
    model, params = loud
    sampling = dataclasses.replace(SAMPLING, temperature=0.0)
    # a head that says "o" and then, after an "o", EOS: the embedding of a token points to the next
    generator = Generator(model, TOKENIZER, sampling)
    table = np.zeros((model.config.padded_vocab_size, CONFIG.width), np.float32)
    head = np.zeros(table.T.shape, np.float32)
    for i, (token, after) in enumerate([(ord("n"), ord("o")), (ord("o"), TOKENIZER.eos_id)]):
        table[token, i], head[i, after] = 1.0, 1.0
    quiet = jax.tree.map(lambda x: x * 0 if x.ndim > 1 else x, params)
    quiet |= {"embedder": {"embedding": table}, "head": {"kernel": head}}
    [done] = generator.complete(quiet, [generator.encode("n")])
    assert done.finished and done.text == "o" and done.tokens == [ord("o"), TOKENIZER.eos_id]
    assert list(generator.stream(quiet, generator.encode("n"))) == ["o"]


def test_prompts_begin_as_transformers_begins_a_text(tmp_path):
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    generator = Generator(Transformer(CONFIG), TOKENIZER, SAMPLING)
    for prompt in [*PROMPTS, ""]:
        assert generator.encode(prompt) == theirs(prompt).input_ids
    assert generator.encode("") == [TOKENIZER.bos_id]


def test_all_known_ends_of_a_turn_stop():
    assert stop_ids(TOKENIZER) == (TOKENIZER.eos_id,)
    chat = dataclasses.replace(
        TOKENIZER, definition=TOKENIZER.definition.replace("<|assistant|>", "<|im_end|>")
    )
    assert stop_ids(chat) == tuple(sorted({chat.eos_id, TOKENIZER.token_id("<|assistant|>")}))


def test_what_cannot_be_is_refused_in_numbers(loud):
    _, params = loud
    learned = Transformer(dataclasses.replace(CONFIG, positions="learned"))
    greedy = SamplingConfig(max_new_tokens=60, temperature=0.0)
    with pytest.raises(
        ValueError, match=r"6 tokens and max_new_tokens=60 need 65 positions; .* 64"
    ):
        Generator(learned, TOKENIZER, greedy).complete(params, [[1] * 6])
    with pytest.raises(ValueError, match="temperature=1.0 draws at random: give a key"):
        Generator(learned, TOKENIZER, SAMPLING)(params, ["a"])
