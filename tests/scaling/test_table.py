"""Reading tables: columns found and told, units, bad rows counted and named."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llm.scaling.runs import Runs, count_sizes, group_sizes, split_by_flops
from llm.scaling.table import load_runs

PYTHIA = pathlib.Path(__file__).resolve().parents[3] / "shared/data/pythia_zero_shot_flat.csv"


def write(folder, text: str) -> pathlib.Path:
    path = folder / "table.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "N,D,loss",
        "params,tokens,loss",
        "Parameters,Training Tokens,Val loss",
        "model_size,n_tokens,final_loss",
        "Model Size;Training Tokens;loss",
        "num_params\tnum_tokens\teval loss",
    ],
)
def test_common_spellings_are_found_and_told(tmp_path, header):
    mark = next(mark for mark in ",;\t" if mark in header)
    rows = "".join(mark.join(row) + "\n" for row in (("1e8", "2e9", "3.1"), ("2e8", "4e9", "2.9")))
    loaded = load_runs(write(tmp_path, f"{header}\n{rows}"))
    np.testing.assert_allclose(loaded.runs.num_params, [1e8, 2e8])
    np.testing.assert_allclose(loaded.runs.num_tokens, [2e9, 4e9])
    np.testing.assert_allclose(loaded.runs.loss, [3.1, 2.9])
    np.testing.assert_allclose(loaded.runs.flops, [1.2e18, 4.8e18])  # 6·N·D
    assert any("guessed" in note and "params = " in note for note in loaded.notes)
    assert "flops worked out by C = 6·N·D" in loaded.notes


def test_any_two_sizes_give_the_third(tmp_path):
    # The columns of Besiroglu et al. 2024's table; its tokens are FLOP/(6·size) as well.
    path = write(tmp_path, "Model Size,Training FLOP,loss\n1e8,1.2e18,3.1\n")
    assert load_runs(path).runs.num_tokens[0] == pytest.approx(2e9)
    path = write(tmp_path, "compute_budget,training_tokens,validation_loss\n1.2e18,2e9,3.1\n")
    assert load_runs(path).runs.num_params[0] == pytest.approx(1e8)
    # Two that are named are enough: a third that is there is not guessed.
    path = write(tmp_path, "N,D,C,loss\n1e8,5e9,1.2e18,3.1\n")
    named = load_runs(path, columns={"params": "N", "flops": "C"})
    assert named.runs.num_tokens[0] == pytest.approx(2e9)
    assert load_runs(path).runs.num_tokens[0] == 5e9
    assert any("times 6·N·D" in note for note in load_runs(path).notes)


def test_units_of_columns_cells_and_flags(tmp_path):
    path = write(tmp_path, 'Params (M),tokens_billions,loss\n70,"1,000",3.1\n')
    loaded = load_runs(path)
    assert (loaded.runs.num_params[0], loaded.runs.num_tokens[0]) == (70e6, 1e12)
    assert sum("taken as multiples" in note for note in loaded.notes) == 2
    path = write(tmp_path, "params,tokens,loss\n70M,0.3,3.1\n1.4B,2,2.9\n")
    loaded = load_runs(path)
    np.testing.assert_allclose(loaded.runs.num_params, [70e6, 1.4e9])
    assert any("tokens run from 0.3 to 2: if they are in" in note for note in loaded.notes)
    scaled = load_runs(path, units={"tokens": 1e9})
    np.testing.assert_allclose(scaled.runs.num_tokens, [3e8, 2e9])


def test_losses_in_bits_and_perplexities(tmp_path):
    path = write(tmp_path, "N,D,loss\n1e8,2e9,4\n")
    assert load_runs(path, loss_unit="bits").runs.loss[0] == pytest.approx(4 * np.log(2))
    assert load_runs(path, loss_unit="perplexity").runs.loss[0] == pytest.approx(np.log(4))


def test_bad_rows_are_counted_named_and_skipped_up_to_a_limit(tmp_path):
    good = "1e8,2e9,3.1\n"
    bad = "1e8,,3\n1e8,nan,3\n0,1,3\n-1,1,3\ninf,1,3\n1e8,1\n1,2,3,4\n1,2,3,14\n\nsmall,1,3\n"
    path = write(tmp_path, "N,D,loss\n" + good + bad + good * 90)
    loaded = load_runs(path)
    assert len(loaded.runs) == 91 and loaded.num_bad_rows == 9
    assert loaded.runs.row[:2].tolist() == [2, 13]
    note = next(note for note in loaded.notes if "skipped" in note)
    assert "9 of 100 rows" in note and "in rows 3, 4, 5, 6, 7, … (the header is row 1)" in note
    with pytest.raises(ValueError, match="9 of 100 rows .* at most 5% may be skipped"):
        load_runs(path, max_bad_fraction=0.05)


def test_decimal_commas_are_no_thousands(tmp_path):
    path = write(tmp_path, "N;D;loss\n" + "1e8;2e9;3,14\n" * 3)
    with pytest.raises(ValueError, match="3 of 3 rows have a cell that is not a positive number"):
        load_runs(path)


def test_rows_are_chosen_by_value_and_runs_by_name(tmp_path):
    path = write(
        tmp_path, "name,set,N,D,loss\na,x,1e8,1e9,4\na,x,1e8,2e9,3.5\nb,x,2e8,1e9,3.8\nc,y,1,1,1\n"
    )
    loaded = load_runs(path, columns={"run": "name"}, where=[("set", "x")])
    assert loaded.runs.run.tolist() == [0, 0, 1]
    assert loaded.runs.ends().loss.tolist() == [3.5, 3.8]
    with pytest.raises(ValueError, match="no row has set=z"):
        load_runs(path, where=[("set", "z")])


def test_parquet(tmp_path):
    table = pa.table({"N": [1e8, 2e8, None], "D": [10**9, 10**10, 1], "loss": [3.0, 2.5, 2.0]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    loaded = load_runs(tmp_path / "t.parquet")
    np.testing.assert_allclose(loaded.runs.num_tokens, [1e9, 1e10])
    assert loaded.num_bad_rows == 1


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("N,D,loss\n1,2,3\n", {"loss": "Lose"}, r"no column 'Lose' \(loss_column\); did you mean"),
        (
            "N,D,loss\n1,2,3\n",
            {"flops": "C"},
            r"no column 'C' \(flops_column\)\. It has N, D, loss",
        ),
        ("N,E,loss\n1,2,3\n", {}, "no column for tokens and flops"),
        ("N,D,accuracy\n1,2,3\n", {}, "no column for the loss"),
        ("N,D,loss\n", {}, "no rows below the header"),
        ("N,N,loss\n1,2,3\n", {}, "two columns 'N'"),
        ("", {}, "is no CSV or Parquet table"),
        ("N,D,loss\nä,ö,ü\n", {}, "1 of 1 rows have a cell"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_runs(write(tmp_path, text), columns=columns)
    assert "\n" not in str(caught.value)


def test_sizes_within_a_percent_are_one():
    sizes = np.array([1.006e8, 1e8, 2e8, 1.009e8, 2.03e8])
    assert group_sizes(sizes).tolist() == [0, 0, 1, 0, 2]
    assert count_sizes(sizes) == 3


def test_held_out_budgets_are_not_on_both_sides():
    rounded = np.repeat([1e9, 2e9], 5) * (1 + 0.003 * np.arange(10) % 0.01)  # to whole steps
    runs = Runs.of(np.full(10, 1e8), rounded, np.linspace(4, 3, 10))
    smaller, larger = split_by_flops(runs, 0.2)
    assert (len(smaller), len(larger)) == (5, 5)


@pytest.mark.skipif(not PYTHIA.exists(), reason="the published tables are not here")
def test_pythia_s_evaluations_read_as_curves():
    loaded = load_runs(
        PYTHIA, columns={"loss": "lambada_ppl", "run": "model"}, loss_unit="perplexity"
    )
    assert (len(loaded.runs), loaded.num_bad_rows) == (416, 16)  # step 0 has seen no tokens
    assert len(loaded.runs.ends()) == 16
