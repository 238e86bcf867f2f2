"""The packaged corpora: what is kept, and that held-out text is not training text."""

import collections
import pathlib
import platform
import sysconfig

import numpy as np
import pytest

from llm.data.builders import grouping
from llm.data.config import SourceConfig
from llm.data.sources import open_source
from llm.data.text_classifier import labels_are_clear, make_text_classifier

SPLITS = ("train", "validation", "test")


def read(name, split):
    """Return all rows of a split, as dicts of str, through the door that users use."""
    row_format = "prompt_response" if name.endswith("instructions") else "text"
    source = open_source(
        SourceConfig("tfds", name, split=split, format=row_format, validation_fraction=0.0)
    )
    rows = [row.fields for shard in source.shards() for row in source.rows(shard, ())]
    return [{key: value.decode() for key, value in row.items()} for row in rows]


def num_bytes(rows):
    return sum(len(row["text"].encode()) for row in rows)


def similarity(one, other, shingles):
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


# --- English prose --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prose():
    return {split: read("english_prose", split) for split in SPLITS}


@pytest.mark.network
def test_prose_is_one_edition_of_each_work(prose):
    rows = [row for split in SPLITS for row in prose[split]]
    assert collections.Counter(row["author"] for row in rows) == {
        "Shakespeare, William": 42,  # 37 plays and 5 books of poems
        "Milton, John": 6,
    }
    titles = [row["title"] for row in rows]
    assert len(set(titles)) == 48
    assert {"Hamlet", "Paradise Lost", "Twelfth Night"} <= set(titles)
    assert [len(prose[split]) for split in SPLITS] == [42, 3, 3]
    assert [num_bytes(prose[split]) for split in SPLITS] == [5_777_511, 330_078, 331_278]


@pytest.mark.network
def test_prose_works_are_whole_and_clean(prose):
    texts = {row["title"]: row["text"] for split in SPLITS for row in prose[split]}
    # The package's modern Cymbeline lacks acts III and IV; the folio's has five.
    cymbeline = texts["Cymbeline"]
    assert all(f"Actus {act}" in cymbeline for act in "Secundus Tertius Quartus Quintus".split())
    for text in texts.values():
        assert "gutenberg" not in text.lower()
        assert "\r" not in text and " \n" not in text and not text.startswith("\ufeff")


@pytest.mark.network
def test_prose_held_out_works_share_no_passages_with_training(prose):
    train = [grouping.word_shingles(row["text"]) for row in prose["train"]]
    everything = set().union(*train)
    for split in ("validation", "test"):
        for row in prose[split]:
            shingles = grouping.word_shingles(row["text"])
            # Stock phrases of one author: under 1% against all of training together,
            # where two editions of a work share about 20%.
            assert len(shingles & everything) < 0.01 * len(shingles), row["title"]


@pytest.mark.network
def test_prose_works_that_quote_each_other_are_one_group(prose):
    groups = collections.defaultdict(list)
    for split in SPLITS:
        for row in prose[split]:
            groups[row["work"]].append(row["title"])
    shared = sorted(sorted(titles) for titles in groups.values() if len(titles) > 1)
    assert shared == [
        ["Comus", "Poetical Works"],
        ["Love's Labour's Lost", "The Passionate Pilgrim"],
    ]


# --- Standard library -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def code():
    return {split: read("stdlib_code", split) for split in SPLITS}


def test_code_is_split_by_module(code):
    modules = {split: {row["module"] for row in code[split]} for split in SPLITS}
    assert {"json", "argparse", "tarfile"} <= modules["validation"]
    assert {"ipaddress", "subprocess", "zipfile"} <= modules["test"]
    assert {"asyncio", "email", "os", "typing"} <= modules["train"]
    assert not modules["train"] & (modules["validation"] | modules["test"])
    assert not modules["validation"] & modules["test"]
    sizes = [num_bytes(code[split]) for split in SPLITS]
    assert 7e6 < sizes[0] < 12e6  # by the Python that runs, and by what its packager left out
    assert 0.03 < sizes[1] / sum(sizes) < 0.08 and 0.03 < sizes[2] / sum(sizes) < 0.08


def test_code_is_source_and_this_pythons(code):
    rows = [row for split in SPLITS for row in code[split]]
    paths = {row["path"] for row in rows}
    assert "json/decoder.py" in paths and "encodings/utf_8.py" in paths
    assert not [
        p
        for p in paths
        if p.startswith("test/") or "/test/" in p or "site-packages" in p or "_sysconfigdata" in p
    ]
    assert "encodings/cp1252.py" not in paths and "pydoc_data/topics.py" not in paths
    (text,) = [row["text"] for row in rows if row["path"] == "this.py"]
    assert text == pathlib.Path(sysconfig.get_path("stdlib"), "this.py").read_text("utf-8")
    config = SourceConfig(kind="tfds", name="stdlib_code", validation_fraction=0.0)
    assert f"/python{platform.python_version()}/" in open_source(config).reader.fingerprint()


def test_code_held_out_modules_are_no_copies(code):
    train = [grouping.word_shingles(row["text"]) for row in code["train"]]
    for row in code["validation"] + code["test"]:
        held_out = grouping.word_shingles(row["text"])
        closest = max(len(held_out & other) / len(held_out | other) for other in train)
        assert closest < 0.25, row["path"]


# --- Film reviews ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return {split: read("film_reviews/rows", split) for split in SPLITS}


@pytest.mark.network
def test_film_rows_keep_labels_and_drop_repeats(rows):
    every = [row for split in SPLITS for row in rows[split]]
    kinds = collections.Counter((row["kind"], row["label"]) for row in every)
    # The file has 7,403 fresh and 5,405 rotten reviews and 1,097 plots (DATA.md), of which 56
    # reviews and 13 plots repeat another, and 1 plot more is empty.
    assert kinds["review", "fresh"] + kinds["review", "rotten"] == 12_808 - 56
    assert kinds["plot", ""] == 1_097 - 14
    assert set(kinds) == {("review", "fresh"), ("review", "rotten"), ("plot", "")}
    assert len({row["text"] for row in every}) == len(every)
    (known,) = [row for row in every if row["text"] == "A three-hour cinema master class."]
    assert (known["label"], known["film"]) == ("fresh", "a_grin_without_a_cat")


@pytest.mark.network
def test_films_are_in_one_split_under_all_their_names(rows):
    films = {split: {row["film"] for row in rows[split]} for split in SPLITS}
    assert not films["train"] & (films["validation"] | films["test"])
    assert not films["validation"] & films["test"]
    one_film = {"el_crimen_del_padre_amaro", "the_crime_of_padre_amaro"}  # shares its reviews
    assert sum(bool(films[split] & one_film) for split in SPLITS) == 1
    for split in ("validation", "test"):
        labels = collections.Counter(row["label"] for row in rows[split])
        assert labels["fresh"] > 400 and labels["rotten"] > 400


@pytest.mark.network
def test_film_documents_hold_the_rows_of_the_same_split(rows):
    for split in SPLITS:
        documents = {row["film"]: row["text"] for row in read("film_reviews", split)}
        assert set(documents) == {row["film"] for row in rows[split]}
        for row in rows[split]:
            assert row["text"] in documents[row["film"]]
    text = documents["adaptation"]
    title, plot, reviews = text.split("\n\n")
    assert title == "Adaptation"
    assert plot.startswith("An account of screenwriter Charlie Kaufman's")
    assert reviews.startswith("Sean Penn, you owe Nicolas Cage an apology.\n")


@pytest.mark.network
def test_clear_instructions_are_those_whose_words_tell_their_label():
    splits = ("train", "judge", "validation", "test")
    every = {split: read("film_reviews/instructions", split) for split in splits}
    clear = {split: read("film_reviews/clear_instructions", split) for split in splits}
    assert clear["validation"] == every["validation"] and clear["test"] == every["test"]
    assert 0.55 < len(clear["judge"]) / len(every["judge"]) < 0.65
    kept = {row["response"] for row in clear["train"]}
    assert kept < {row["response"] for row in every["train"]}
    # Words tell the label of about three in four reviews of films that were not read (DATA.md), of
    # three in five with some certainty.
    assert 0.55 < len(kept) / len(every["train"]) < 0.65
    # Someone who has read other films agrees with more of what was kept than of what was not.
    judge = make_text_classifier().fit(
        [row["response"] for row in every["judge"]], [row["label"] for row in every["judge"]]
    )
    texts = np.array([row["response"] for row in every["train"]])
    right = judge.predict(texts) == [row["label"] for row in every["train"]]
    is_kept = np.isin(texts, list(kept))
    assert np.mean(right[is_kept]) > 0.88 and np.mean(right[~is_kept]) < 0.58


# --- Chinese reviews ------------------------------------------------------------------------


@pytest.mark.network
def test_chinese_reviews_are_distinct_and_of_one_label():
    splits = {split: read("chinese_reviews", split) for split in SPLITS}
    texts = [row["text"] for split in SPLITS for row in splits[split]]
    # 17,411 distinct lines (DATA.md), of which one is empty and 47 bear both labels.
    assert len(texts) == len(set(texts)) == 17_411 - 1 - 47
    labels = collections.Counter(row["label"] for split in SPLITS for row in splits[split])
    assert labels == {"positive": 8_379 - 47, "negative": 9_078 - 47}
    for split in ("validation", "test"):
        assert 0.04 < len(splits[split]) / len(texts) < 0.06
    # Nearly equal reviews are on one side: none of a sample has a close copy in training.
    train = [grouping.character_shingles(row["text"]) for row in splits["train"]]
    for row in splits["validation"][::100]:
        shingles = grouping.character_shingles(row["text"])
        assert max(len(shingles & other) / len(shingles | other) for other in train) < 0.4


# --- Words and labels -----------------------------------------------------------------------


def test_a_label_is_clear_where_other_groups_show_it():
    # Each group says "good" or "bad" once with the label and has a name for itself besides.
    texts, labels, groups = [], [], []
    for i in range(40):
        label = "positive" if i % 2 else "negative"
        texts += [f"name{i} {'good' if i % 2 else 'bad'}", f"name{i}"]
        labels += [label, label]
        groups += [i, i]
    clear = labels_are_clear(texts, labels, groups)
    assert clear[0::2].all()
    # A name is of one group alone: who has read only the others cannot know its label.
    assert clear[1::2].mean() < 0.8


# --- Grouping -------------------------------------------------------------------------------


def test_shingles_are_runs_of_words_or_letters():
    assert len(grouping.word_shingles("One two, THREE four", width=2)) == 3
    assert grouping.word_shingles("One two!", 2) == grouping.word_shingles("one  TWO", 2)
    assert len(grouping.character_shingles("价格，实惠", width=3)) == 2
    assert grouping.word_shingles("short") == grouping.word_shingles("Short.")


def test_similar_texts_merge_their_groups():
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    texts = [
        ("b", " ".join(words)),
        ("a", " ".join([*words, "lambda"])),
        ("c", "something else entirely, of other words"),
        ("a", "something else again"),
    ]
    groups = grouping.merge_similar(
        texts, lambda text: grouping.word_shingles(text, 3), threshold=0.8
    )
    # 8 of 9 runs of three words are shared: 8/9 ≥ 0.8.
    assert [groups.find(name) for name in "abc"] == ["a", "a", "c"]
    assert similarity(texts[0][1], texts[1][1], lambda t: grouping.word_shingles(t, 3)) == 8 / 9


def test_groups_chain():
    groups = grouping.Groups()
    for one, other in ("dc", "ba", "cb"):
        groups.merge(one, other)
    assert {groups.find(name) for name in "abcd"} == {"a"} and groups.find("e") == "e"


def test_split_by_hash_gives_the_shares():
    shares = {"validation": 0.1, "test": 0.2}
    counts = collections.Counter(grouping.split_by_hash(f"name {i}", shares) for i in range(5000))
    assert 430 < counts["validation"] < 570 and 915 < counts["test"] < 1085
    assert counts.total() == 5000
    # The same in every process and on every machine: SHA-256 of "a" begins with ca978112.
    assert grouping.hash_fraction("a") == pytest.approx(0xCA978112 / 2**32, abs=1e-9)
