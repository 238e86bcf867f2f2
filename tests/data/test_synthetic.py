"""Made-up tasks: literal rows, splits that do not leak, batches of one place."""

import numpy as np
import pytest

from llm.data.synthetic.addition import addition_sequences, addition_split, drawn_from
from llm.data.synthetic.batches import Sequences, TaskBatches, as_batch
from llm.data.synthetic.few_shot import FUNCTIONS, few_shot_mixture, few_shot_rows
from llm.data.synthetic.modular import modular_addition
from llm.data.synthetic.parity import SparseParity
from llm.data.synthetic.repeats import repeated_segments, repeated_twice

LEE = {"plain": "128+367=0495", "reversed": "128+367=5940"}
LETTERS = "abcdefghijklmnopqrstuvwxyz>,"


@pytest.mark.parametrize("order", LEE)
def test_addition_as_it_is_written(order):
    rows = addition_sequences(np.array([128]), np.array([367]), 3, order)
    assert "".join("0123456789+="[t] for t in rows.tokens[0]) == LEE[order]
    assert rows.weights[0].tolist() == [0] * 7 + [1] * 4


def test_addition_is_right_and_its_problems_differ():
    train, held_out = addition_split(2, "reversed", num_train=700, num_held_out=300, seed=1)
    tokens = np.concatenate([train.tokens, held_out.tokens]).astype(int)
    left, right = tokens[:, 0] * 10 + tokens[:, 1], tokens[:, 3] * 10 + tokens[:, 4]
    total = tokens[:, 6] + 10 * tokens[:, 7] + 100 * tokens[:, 8]
    np.testing.assert_array_equal(left + right, total)
    assert len(set(zip(left, right, strict=True))) == 1000
    with pytest.raises(ValueError, match="10000 pairs of 2 digits"):
        addition_split(2, "plain", num_train=9_999, num_held_out=2, seed=0)
    with pytest.raises(ValueError, match="0 to 99"):
        addition_sequences(np.array([100]), np.array([1]), 2, "plain")


def test_both_orders_have_the_same_problems():
    plain, _ = addition_split(3, "plain", num_train=50, num_held_out=5, seed=3)
    backwards, _ = addition_split(3, "reversed", num_train=50, num_held_out=5, seed=3)
    np.testing.assert_array_equal(plain.tokens[:, :8], backwards.tokens[:, :8])
    np.testing.assert_array_equal(plain.tokens[:, 8:], backwards.tokens[:, :7:-1])


def test_modular_addition_holds_out_what_was_seen_in_neither_order():
    train, held_out = modular_addition(13, 0.4, seed=2)
    tokens = np.concatenate([train.tokens, held_out.tokens])
    np.testing.assert_array_equal((tokens[:, 0] + tokens[:, 1]) % 13, tokens[:, 3])
    assert set(tokens[:, 2]) == {13}
    np.testing.assert_array_equal(np.unique(train.weights, axis=0), [[0, 0, 1]])
    seen, others = (
        {tuple(row[:2]) for row in split.tokens.tolist()} for split in (train, held_out)
    )
    assert (len(seen), len(others)) == (len(train.tokens), len(held_out.tokens))  # each once
    assert not others & (seen | {(b, a) for a, b in seen})
    assert others == {(b, a) for a, b in others}
    assert len(seen) == pytest.approx(0.4 * 169, abs=1)
    # Of pairs drawn one by one, as many are missed in both orders, and as many drawn in both.
    unequal = 13 * 12
    assert sum(a != b for a, b in others) == pytest.approx(0.6**2 * unequal, abs=2)
    assert sum(a != b and (b, a) in seen for a, b in seen) == pytest.approx(0.16 * unequal, abs=4)


def test_modular_addition_differs_by_seed_and_not_in_size():
    one, other = (modular_addition(13, 0.4, seed) for seed in (2, 3))
    assert not np.array_equal(one[0].tokens, other[0].tokens)
    assert [x.tokens.shape for x in one] == [x.tokens.shape for x in other]
    with pytest.raises(ValueError, match="train_fraction"):
        modular_addition(13, 1.0, seed=0)


def test_repeats_are_repeats():
    rows = repeated_segments(50, 24, shortest=5)(np.random.default_rng(0), 200).tokens
    periods = {next(p for p in range(1, 25) if np.array_equal(row[p:], row[:-p])) for row in rows}
    assert periods == set(range(5, 13))
    twice = repeated_twice(np.random.default_rng(0), 50, 8, 3)
    np.testing.assert_array_equal(twice.tokens[:, :8], twice.tokens[:, 8:])
    # the first token of the repetition cannot be known; the others can
    assert twice.weights[0].tolist() == [0] * 8 + [1] * 7


def test_parity_by_hand():
    problem = SparseParity(num_subtasks=20, num_bits=10, subset_bits=3, alpha=0.4, seed=1)
    assert len({tuple(s) for s in problem.subsets.tolist()}) == 20
    ratio = problem.frequencies[0] / problem.frequencies[9]
    assert ratio == pytest.approx(10**1.4)
    assert problem.frequencies.sum() == pytest.approx(1)
    rows = problem.rows(np.random.default_rng(0), 20_000)
    for i in range(50):
        bits = rows.bits[i, problem.subsets[rows.subtask[i]]]
        assert int(bits.sum()) % 2 == rows.parity[i]
    counts = np.bincount(rows.subtask, minlength=20) / 20_000
    np.testing.assert_allclose(counts, problem.frequencies, atol=0.01)
    with pytest.raises(ValueError, match="only 4 sets"):
        SparseParity(5, 4, 3, 0.4, 0)


EXPECTED = {
    "copy": "bcda",
    "reverse": "adcb",
    "next letter": "cdeb",
    "third next letter": "efgd",
    "rotate": "cdab",
    "sort": "abcd",
    "first letter": "bbbb",
    "last letter": "aaaa",
}


def test_functions_on_a_word():
    word = np.array([[1, 2, 3, 0]])
    found = {n: "".join(LETTERS[t] for t in f(word)[0]) for n, f in FUNCTIONS.items()}
    assert found == EXPECTED


def test_few_shot_rows_show_one_function():
    rows = few_shot_rows(np.random.default_rng(0), np.array([1, 5]), 3, 2)
    for row, function in zip(rows.tokens, (lambda w: w[::-1], sorted), strict=True):
        text = "".join(LETTERS[t] for t in row)
        assert len(text) == 15
        for example in text.split(","):
            word, answer = example.split(">")
            assert answer == "".join(function(word))
    assert rows.weights[0].tolist() == [0] * 3 + [1] * 3 + [0] * 5 + [1] * 3
    last = few_shot_rows(np.random.default_rng(0), np.array([1]), 3, 2, last_only=True)
    assert last.weights[0].tolist() == [0] * 11 + [1] * 3


def test_batches_are_a_function_of_task_seed_and_place():
    mixture = few_shot_mixture(3, 2)
    batches = TaskBatches([mixture, mixture, mixture], [0, 0, 5], 4)
    first, second, third = (next(batches) for _ in range(3))
    assert first["tokens"].shape == (3, 4, 14)
    np.testing.assert_array_equal(first["tokens"][0], first["tokens"][1])
    assert not np.array_equal(first["tokens"][0], first["tokens"][2])
    assert not np.array_equal(first["tokens"], second["tokens"])
    assert int(second["cursor"]) == 8
    again = TaskBatches([mixture, mixture, mixture], [0, 0, 5], 4)
    again.seek(8)
    np.testing.assert_array_equal(next(again)["tokens"], third["tokens"])
    with pytest.raises(ValueError, match="multiple"):
        again.seek(3)


def test_a_batch_shifts_its_targets():
    rows = Sequences(np.array([[3, 1, 4, 1]], np.int32), np.array([[0, 1, 1]], np.float32))
    batch = as_batch(rows)
    assert batch["tokens"].tolist() == [[3, 1, 4]]
    assert batch["targets"].tolist() == [[1, 4, 1]]
    assert batch["positions"].tolist() == [[0, 1, 2]]
    drawn = drawn_from(rows)(np.random.default_rng(0), 5)
    np.testing.assert_array_equal(drawn.tokens, np.repeat(rows.tokens, 5, axis=0))
