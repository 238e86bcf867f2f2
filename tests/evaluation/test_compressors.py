"""Bits per byte under the compressors, against the compressors themselves and known contents."""

import gzip
import lzma
import random

import pytest
import zstandard

from llm.evaluation.compressors import compressor_bits_per_byte

XZ_BEST = 9 | lzma.PRESET_EXTREME


def _random_text(num_characters: int, seed: int, alphabet: str = "0123456789abcdef") -> str:
    return "".join(random.Random(seed).choices(alphabet, k=num_characters))


def _prose(num_words: int, seed: int) -> str:
    words = [_random_text(1 + i % 9, i, "etaoinshrdlu") for i in range(300)]
    rng = random.Random(seed)
    return " ".join(words[int(300 ** rng.random()) - 1] for _ in range(num_words))


def test_sizes_are_those_of_the_compressors_on_the_concatenated_documents():
    heldout = {"plays": [_prose(3000, 1), _prose(500, 2)], "poems": [_prose(1000, 3), "ü"]}
    training = [_prose(9000, 4), _prose(40, 5)]
    bits = compressor_bits_per_byte(heldout, training)

    def ended(documents):
        return b"".join(text.encode() + b"\0" for text in documents)

    plays, poems, before = ended(heldout["plays"]), ended(heldout["poems"]), ended(training)
    texts = {"plays": (plays, 2), "poems": (poems, 2), "all": (plays + poems, 4)}
    for domain, (text, num_ends) in texts.items():
        num_bytes = len(text) - num_ends
        sizes = {
            "gzip": len(gzip.compress(text, 9)),
            "gzip_given_training": len(gzip.compress(before + text, 9))
            - len(gzip.compress(before, 9)),
            "xz": len(lzma.compress(text, preset=XZ_BEST)),
            "xz_given_training": len(lzma.compress(before + text, preset=XZ_BEST))
            - len(lzma.compress(before, preset=XZ_BEST)),
        }
        for name, size in sizes.items():
            assert bits[name][domain] == 8 * size / num_bytes, (name, domain)
        size = len(zstandard.ZstdCompressor(level=22).compress(text))
        assert bits["zstd"][domain] == pytest.approx(8 * size / num_bytes, rel=0.01)


def test_random_text_costs_its_entropy_and_a_text_seen_in_training_next_to_nothing():
    text = _random_text(60_000, seed=7)  # 4 bits a character
    bits = compressor_bits_per_byte({"new": [_random_text(60_000, seed=8)], "seen": [text]}, [text])
    for name in ("zstd", "xz"):
        assert 3.99 < bits[name]["new"] < 4.2
        assert 3.99 < bits[name + "_given_training"]["new"] < 4.2
        assert 0 < bits[name + "_given_training"]["seen"] < 0.02
    # gzip looks back 32 KiB and the copy lies 60 KB back: the format's limit.
    assert bits["gzip_given_training"]["seen"] > 4


def test_windows_reach_back_over_more_text_than_the_presets_do():
    text = _random_text(20_000, seed=9)
    # xz -9 has a dictionary of 64 MiB.
    bits = compressor_bits_per_byte({"far": [text]}, [text, "a" * (66 << 20)])
    assert bits["xz_given_training"]["far"] < 0.05
    assert bits["zstd_given_training"]["far"] < 0.05


def test_errors_name_the_domain():
    with pytest.raises(ValueError, match="'code' has no text"):
        compressor_bits_per_byte({"prose": ["a"], "code": [""]}, ["b"])
    with pytest.raises(ValueError, match='call none "all"'):
        compressor_bits_per_byte({"all": ["a"]}, ["b"])
    with pytest.raises(ValueError, match="at least one"):
        compressor_bits_per_byte({}, ["b"])
