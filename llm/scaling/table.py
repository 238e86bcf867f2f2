"""Read training runs from any CSV or Parquet table: columns found, bad rows counted and named.

Third floor.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from etils import epath
from jaxtyping import Float

from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN, Runs

# Spellings seen in published tables, in lower case without spaces and marks; the first found wins.
SPELLINGS = {
    "params": (
        "n params parameters numparams nparams modelsize modelparams modelparameters paramcount "
        "numparameters nparameters parametercount size nonembeddingparams nonembparams"
    ).split(),
    "tokens": (
        "d tokens trainingtokens traintokens numtokens ntokens totaltokens tokensseen "
        "trainedtokens datasetsize datasize trainingdata data"
    ).split(),
    "flops": (
        "c flops flop trainingflops trainingflop trainflops totalflops numflops compute "
        "trainingcompute budget computebudget flopbudget"
    ).split(),
    "loss": (
        "loss validationloss valloss evalloss testloss finalloss crossentropy nll l trainingloss "
        "trainloss"
    ).split(),
    "unique_tokens": "u uniquetokens numuniquetokens datauniquetokens uniquedata".split(),
    "run": "run runid runname".split(),
}
_UNIT_WORDS = {
    1e3: "k thousand thousands",
    1e6: "m mm million millions",
    1e9: "b bn g billion billions",
    1e12: "t tn trillion trillions",
}
_UNITS = {word: unit for unit, words in _UNIT_WORDS.items() for word in words.split()}
_NUMBER = re.compile(
    r"([+-]?(?:\d{1,3}(?:[,_]\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKmMbBgGtT]?)"
)
_LOSS_UNITS = {
    "nats": lambda loss: loss,
    "bits": lambda loss: loss * np.log(2),
    "perplexity": np.log,
}
_NAMED_ROWS = 5  # of the bad ones, in a message


@dataclasses.dataclass(frozen=True)
class LoadedRuns:
    """Runs, and in words what was taken from where and what was left out."""

    runs: Runs
    columns: Mapping[str, str]
    notes: tuple[str, ...]
    num_bad_rows: int


def load_runs(
    path: epath.PathLike,
    *,
    columns: Mapping[str, str] | None = None,
    units: Mapping[str, float] | None = None,
    loss_unit: Literal["nats", "bits", "perplexity"] = "nats",
    where: Sequence[tuple[str, str]] = (),
    max_bad_fraction: float = 0.1,
) -> LoadedRuns:
    """Return the runs of a table.

    Any two of parameters, tokens and FLOPs are enough: C = 6·N·D gives the third. A column that is
    not named is guessed from common spellings, and a guess is told; of the three, none is guessed
    where two are named. A row in which a needed cell is not a positive number (1e9, 1,000, 70M) is
    skipped, counted and named.

    Args:
      columns: the names of params, tokens, flops, loss, unique_tokens, run; any of them.
      units: what a params, tokens, flops or unique_tokens cell is multiplied with.
      loss_unit: nats, bits (a token), or perplexity.
      where: (column, value) pairs; only rows that have these values are read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no table, a column is missing, or more than `max_bad_fraction` of the
        rows (and more than one) are bad.
    """
    table = _read(epath.Path(path))
    taken, notes = _find_columns(path, list(table), dict(columns or {}))
    units = dict(units or {})
    for name, column in taken.items():
        unit = None if name in ("loss", "run") else _unit_in(column)
        if unit and name not in units:
            units[name] = unit
            notes.append(f"{name}: column {column!r} taken as multiples of {unit:g}")
    keep = np.ones(len(table["\0row"]), bool)
    for column, value in where:
        _demand(path, list(table), column, "where")
        keep &= np.array([cell.strip() == value for cell in table[column]], bool)
    if not keep.any():
        chosen = " and ".join(f"{column}={value}" for column, value in where)
        raise ValueError(f"{path}: no row" + (f" has {chosen}" if where else "s below the header"))

    numbers = {
        name: np.array([_number(cell) for cell in table[column]]) * units.get(name, 1.0)
        for name, column in taken.items()
        if name != "run"
    }
    numbers["loss"] = _LOSS_UNITS[loss_unit](numbers["loss"])
    good = keep & np.all([np.isfinite(x) & (x > 0) for x in numbers.values()], axis=0)
    bad_rows = table["\0row"][keep & ~good].tolist() + (table["\0broken"] if not where else [])
    total = int(keep.sum()) + len(bad_rows) - int((keep & ~good).sum())
    if bad_rows:
        named = ", ".join(map(str, sorted(bad_rows)[:_NAMED_ROWS]))
        more = ", …" if len(bad_rows) > _NAMED_ROWS else ""
        message = (
            f"{path}: {len(bad_rows)} of {total} rows have a cell that is not a positive number, "
            f"in rows {named}{more} (the header is row 1)"
        )
        if not good.any() or len(bad_rows) > max(1.0, max_bad_fraction * total):
            raise ValueError(f"{message}; at most {max_bad_fraction:.0%} may be skipped")
        notes.append(f"{message}: skipped")
    run = np.arange(len(keep))
    if "run" in taken:
        run = np.unique(np.array(table[taken["run"]]), return_inverse=True)[1]
    runs = _complete(
        {name: x[good] for name, x in numbers.items()}, run[good], table["\0row"][good]
    )
    notes.extend(_warnings(runs, taken))
    return LoadedRuns(runs, taken, tuple(notes), len(bad_rows))


def _complete(
    numbers: dict[str, Float[np.ndarray, " R"]], run: np.ndarray, row: np.ndarray
) -> Runs:
    """Work out what is not in the table by C = 6·N·D."""
    params, tokens, flops = (numbers.get(name) for name in ("params", "tokens", "flops"))
    if params is None:
        params = flops / (FLOPS_PER_PARAM_TOKEN * tokens)
    if tokens is None:
        tokens = flops / (FLOPS_PER_PARAM_TOKEN * params)
    others = {"run": run, "row": row, "unique_tokens": numbers.get("unique_tokens")}
    if flops is not None:
        others["flops"] = flops
    return Runs.of(params, tokens, numbers["loss"], **others)


def _warnings(runs: Runs, taken: Mapping[str, str]) -> list[str]:
    notes = []
    for name, sizes, least in (("params", runs.num_params, 1e3), ("tokens", runs.num_tokens, 1e5)):
        if len(runs) and sizes.max() < least:
            notes.append(
                f"{name} run from {sizes.min():.4g} to {sizes.max():.4g}: if they are in millions "
                f"or billions, {name}_unit=1e6 or 1e9 says so"
            )
    if {"params", "tokens", "flops"} <= set(taken) and len(runs):
        ratio = np.median(runs.flops / (FLOPS_PER_PARAM_TOKEN * runs.num_params * runs.num_tokens))
        if abs(np.log(ratio)) > np.log(1.05):
            notes.append(
                f"the FLOPs of the table are {ratio:.3g} times 6·N·D (median); budgets are read as "
                "6·N·D by the parametric laws"
            )
    return notes


# --------------------------------------------------------------------------------------- columns


def _find_columns(
    path: epath.PathLike, names: list[str], asked: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the column of each quantity that is needed or can be guessed, and notes on guesses."""
    names = [name for name in names if not name.startswith("\0")]
    asked = {quantity: column for quantity, column in asked.items() if column}
    for quantity, column in asked.items():
        _demand(path, names, column, f"{quantity}_column")
    taken, sizes = dict(asked), ("params", "tokens", "flops")
    guessed = {}
    for quantity, spellings in SPELLINGS.items():
        if quantity in taken or quantity == "run":  # a run's name is never guessed
            continue
        if quantity in sizes and sum(size in asked for size in sizes) >= 2:
            continue
        by_spelling = {_plain(name): name for name in reversed(names)}
        for spelling in spellings:
            if spelling in by_spelling and by_spelling[spelling] not in taken.values():
                guessed[quantity] = by_spelling[spelling]
                break
    taken |= guessed
    listed = ", ".join(names)
    if sum(size in taken for size in sizes) < 2:
        missing = " and ".join(size for size in sizes if size not in taken)
        raise ValueError(
            f"{path}: no column for {missing}, and two of params, tokens and flops are needed; "
            f"name them by params_column, tokens_column or flops_column; it has {listed}"
        )
    if "loss" not in taken:
        raise ValueError(f"{path}: no column for the loss; name it by loss_column; it has {listed}")
    notes = []
    if guessed:
        pairs = ", ".join(f"{quantity} = {column!r}" for quantity, column in guessed.items())
        notes.append(f"columns guessed from their names: {pairs}")
    absent = [size for size in sizes if size not in taken]
    notes.extend(f"{size} worked out by C = 6·N·D" for size in absent)
    return taken, notes


def _demand(path: epath.PathLike, names: list[str], column: str, what: str) -> None:
    names = [name for name in names if not name.startswith("\0")]
    if column in names:
        return
    by_plain = {_plain(name): name for name in names}
    near = difflib.get_close_matches(_plain(column), list(by_plain), n=1)
    hint = f"; did you mean {by_plain[near[0]]!r}?" if near else "."
    raise ValueError(f"{path} has no column {column!r} ({what}){hint} It has {', '.join(names)}")


def _plain(name: str) -> str:
    """Return a column's name without case, spaces, marks and a unit at its end."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    if len(words) > 1 and words[-1] in _UNITS:
        words.pop()
    return "".join(words)


def _unit_in(column: str) -> float | None:
    """Return the unit at the end of a column's name: "tokens (B)" has 1e9."""
    words = re.findall(r"[a-z0-9]+", column.lower())
    return _UNITS.get(words[-1]) if len(words) > 1 else None


# ----------------------------------------------------------------------------------------- cells


def _number(cell: str) -> float:
    """Return a cell's number, NaN where it has none."""
    match = _NUMBER.fullmatch(cell.strip())
    if not match:
        return np.nan
    number = float(match[1].replace(",", "").replace("_", ""))
    return number * _UNITS.get(match[2].lower(), 1.0)


def _read(path: epath.Path) -> dict:
    """Return each column's cells as text, "\\0row" with their rows, "\\0broken" rows left out."""
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    content = path.read_bytes()
    broken: list[int] = []
    try:
        if content[:4] == b"PAR1":
            table = pa.parquet.read_table(pa.BufferReader(content))
            names, rows = table.column_names, np.arange(len(table)) + 2
            columns = [["" if x is None else str(x) for x in c.to_pylist()] for c in table.columns]
        else:
            names, columns, rows, broken = _read_csv(content)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no CSV or Parquet table: {error}") from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} has two columns {twice!r}: rename one")
    return {**dict(zip(names, columns, strict=True)), "\0row": rows, "\0broken": broken}


def _read_csv(content: bytes) -> tuple[list[str], list[list[str]], np.ndarray, list[int]]:
    first = content.split(b"\n", 1)[0]
    delimiter = max(",;\t", key=lambda mark: first.count(mark.encode()))
    broken: list[int] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        broken.append(row.number)
        return "skip"

    # With made-up names the header is a row like others, and so every column is read as text.
    table = pa.csv.read_csv(
        pa.BufferReader(content),
        pa.csv.ReadOptions(use_threads=False, autogenerate_column_names=True),
        pa.csv.ParseOptions(
            delimiter=delimiter, invalid_row_handler=skip, ignore_empty_lines=False
        ),
        pa.csv.ConvertOptions(strings_can_be_null=False, null_values=[]),
    )
    cells = [[str(cell) for cell in column.to_pylist()] for column in table.columns]
    names = [column[0].strip().lstrip("\ufeff") for column in cells]
    rows = np.setdiff1d(np.arange(1, len(table) + len(broken) + 1), broken)
    filled = [any(column[i].strip() for column in cells) for i in range(1, len(table))]
    columns = [[x for x, full in zip(c[1:], filled, strict=True) if full] for c in cells]
    return names, columns, rows[1:][np.array(filled, bool)], broken
