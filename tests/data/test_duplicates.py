"""Near duplicates: planted copies are found, unrelated text is not, shares are as constructed."""

import random

import pytest

from llm.data import duplicates

WORDS = [
    f"{a}{b}{c}" for a in ("ka", "mor", "ti", "wen") for b in ("lo", "shi", "dra") for c in "naeiou"
]


def prose(seed, num_words=400):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def shares(held_out, training):
    """Best share by held-out document."""
    sample = duplicates.make_held_out_sample(map(duplicates.sample_shingles, held_out))
    found = {}
    for text in training:
        for document, share in zip(*sample.near_duplicates(text), strict=True):
            found[int(document)] = max(share, found.get(int(document), 0))
    return found


def test_copies_are_found_whatever_is_around_them():
    held_out = [prose(i) for i in range(30)]
    collection = " ".join([prose(100), held_out[3], prose(101, 20_000), held_out[7]])
    reformatted = "\n".join(held_out[11].upper().split()) + "!"
    found = shares(held_out, [prose(200), collection, reformatted])
    assert found == {3: 1.0, 7: 1.0, 11: 1.0}


def test_unrelated_text_of_the_same_words_is_not_found():
    assert shares([prose(i) for i in range(50)], [prose(1000 + i, 2000) for i in range(50)]) == {}


@pytest.mark.parametrize("kept", [0.6, 0.75, 0.9])
def test_the_share_is_that_of_the_held_out_text(kept):
    # The beginning of a text inside another one: the share is the length kept.
    text = prose(5, num_words=3000)
    found = shares([text], [prose(6, 9000) + text[: int(kept * len(text))]])
    assert found[0] == pytest.approx(kept, abs=0.12)  # three standard deviations of 128 samples


def test_less_than_half_does_not_count():
    text = prose(5, num_words=3000)
    assert shares([text], [text[: int(0.3 * len(text))]]) == {}


def test_several_held_out_copies_are_all_found():
    assert shares([prose(1), prose(2), prose(1)], [prose(1)]) == {0: 1.0, 2: 1.0}


def test_short_texts_match_when_equal_after_normalising():
    held_out = ["A fine film.", "Dull.", "这部电影很好看", "这部电影不好看"]
    assert shares(held_out, ["a fine film!!", "dull, long", "这部电影很好看。"]) == {0: 1.0, 2: 1.0}


def test_chinese_text_without_spaces_is_compared():
    signs = [chr(0x4E00 + i) for i in range(500)]
    review = "".join(random.Random(0).choices(signs, k=120))
    other = "".join(random.Random(1).choices(signs, k=120))
    assert shares([review, other], [other[:40] + review + other[:10]]) == {0: 1.0}


def test_long_texts_are_hashed_in_parts_without_a_seam(monkeypatch):
    text = prose(9, 3000)
    whole = duplicates.sample_shingles(text)
    monkeypatch.setattr(duplicates, "_PART_BYTES", 1000)
    assert duplicates.sample_shingles(text).tolist() == whole.tolist()
    assert sum(map(len, duplicates.shingle_hashes(text))) == len(text.replace(" ", "")) - 31


def test_samples_never_change_with_a_library_version():
    # Literal: what is found must not depend on the machine.
    assert duplicates.sample_shingles("The quick brown fox jumps over the lazy dog").tolist() == [
        1582376246994219372,
        4373039937128480067,
        4611570384309789486,
        11618462930532520273,
    ]


def test_no_held_out_text_finds_nothing():
    assert shares([], [prose(1)]) == {}
