"""The tables and the summary that every report of a trained model has, from plain numbers.

Bits per byte come as predictor → domain → number, as the baselines return them.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from llm.evaluation.report import Table
from llm.models.config import TransformerConfig
from llm.training.files import write_atomically
from llm.training.goodput import CAUSES, GoodputReport, sum_goodput

# In the order of tables and charts.
PREDICTOR_LABELS = {
    "model": "this model",
    "ngram": "Kneser–Ney n-gram",
    "gzip": "gzip",
    "zstd": "zstd",
    "xz": "xz",
    "gzip_given_training": "gzip + training text",
    "zstd_given_training": "zstd + training text",
    "xz_given_training": "xz + training text",
}

_CAPTION = (
    "Bits per byte, less is better, the best in bold. With “+ training text” a compressor has read "
    "the training text first: the size of both together, less that of the training text."
)

BitsPerByte = Mapping[str, Mapping[str, float]]


def bits_per_byte_table(bits: BitsPerByte) -> Table:
    """Return a table of predictors by domains, "all" first; the best of each domain is bold."""
    domains, predictors = domains_of(bits), predictors_of(bits)
    rows = tuple(
        (PREDICTOR_LABELS.get(name, name), *(bits[name].get(domain) for domain in domains))
        for name in predictors
    )
    bold = set()
    for column in range(1, len(domains) + 1):
        values = [(row[column], i) for i, row in enumerate(rows) if _is_finite(row[column])]
        bold.update({(min(values)[1], column)} if values else ())
    return Table(("Predictor", *domains), rows, _CAPTION, 3, frozenset(bold))


def predictors_of(bits: BitsPerByte) -> list[str]:
    """Return the predictors that there are, in the order of PREDICTOR_LABELS, others last."""
    known = [name for name in PREDICTOR_LABELS if name in bits]
    return known + [name for name in bits if name not in PREDICTOR_LABELS]


def domains_of(bits: BitsPerByte) -> list[str]:
    """Return the domains that any predictor has, "all" first."""
    domains = list(dict.fromkeys(domain for by_domain in bits.values() for domain in by_domain))
    return sorted(domains, key=lambda domain: domain != "all")


def wall_time_table(wall_seconds: Mapping[str, float]) -> Table:
    """Return the seconds of each stage and its share; "total", if given, is no stage."""
    stages = {name: seconds for name, seconds in wall_seconds.items() if name != "total"}
    total = math.fsum(stages.values())
    rows = tuple((name, float(x), 100 * x / total) for name, x in stages.items())
    caption = f"Together {format_duration(total)}."
    return Table(("Stage", "Seconds", "Share (%)"), rows, caption, decimals=1)


def goodput_table(runs: Mapping[str, GoodputReport], most_rows: int = 12) -> Table:
    """Return where the time of runs went, in percent; of many runs, of all together."""
    reports = dict(runs)
    if len(reports) > most_rows:
        reports = {f"{len(reports)} runs": sum_goodput(reports.values())}
    rows = []
    for name, report in reports.items():
        total = max(report.total_seconds, 1e-9)
        shares = (100 * report.seconds[cause] / total for cause in CAUSES)
        rows.append((name, report.starts, report.total_seconds, *shares))
    caption = (
        "Of each run's time, over all its starts; train is goodput, redo are steps that were done "
        "before. Time between starts is not counted."
    )
    columns = ("Run", "Starts", "Seconds", *(f"{cause} (%)" for cause in CAUSES))
    return Table(columns, tuple(rows), caption, decimals=1)


def model_table(
    config: TransformerConfig,
    *,
    num_params: int,
    num_active_params: int,
    flops_per_token: float,
    length_tokens: int,
    num_tokens: int,
) -> Table:
    """Return the shape of a model, its counts as llm.scaling.accounting gives them, its training.

    `num_tokens` are the tokens that it was trained on, repeats counted.
    """
    rows = (
        ("parameters", f"{num_params:,}"),
        ("of them multiplying each token (head, no lookup tables)", f"{num_active_params:,}"),
        ("layers × width", f"{config.num_layers} × {config.width}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("length in tokens", f"{length_tokens:,}"),
        ("training tokens, repeats counted", f"{num_tokens:,}"),
        ("training FLOPs a token", format_power(flops_per_token)),
        ("training FLOPs", format_power(flops_per_token * num_tokens)),
    )
    return Table(("Quantity", "Value"), rows)


def facts_table(facts: Mapping[str, str]) -> Table:
    """Return a table of names and values, such as `hardware_facts()`."""
    return Table(("What", "Value"), tuple(facts.items()))


def format_duration(seconds: float) -> str:
    """Return 75.2 as "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


def format_power(value: float) -> str:
    """Return 1.234e15 as "1.23 × 10¹⁵"."""
    digits, exponent = f"{value:.2e}".split("e")
    return (
        f"{digits} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    )


def write_summary(
    path: epath.PathLike,
    *,
    bits: BitsPerByte,
    wall_seconds: Mapping[str, float],
    **others: Any,
) -> None:
    """Write summary.json: every figure of a report under a key that stays the same.

    "bits_per_byte" is the model's over all domains, "bits_per_byte_xz" that of xz alone,
    "bits_per_byte_xz_given_training", "bits_per_byte_ngram" and so on the others';
    "bits_per_byte_by_domain" has them by domain and predictor; "wall_seconds" is by stage. Not a
    number is null.

    Args:
      path: the file.
      bits: by predictor ("model" is the one without a suffix) and domain, "all" among them.
      wall_seconds: by stage.
      others: further JSON values by key, such as hardware=hardware_facts().

    Raises:
      ValueError: a key of `others` that begins like those above.
    """
    taken = [key for key in others if key.startswith("bits_per_byte")]
    if taken:
        raise ValueError(f"{taken} would be taken for a predictor's bits per byte; rename")
    summary: dict[str, Any] = {}
    for name in predictors_of(bits):
        key = "bits_per_byte" if name == "model" else f"bits_per_byte_{name}"
        summary[key] = bits[name].get("all")
    summary["bits_per_byte_by_domain"] = {
        domain: {name: bits[name].get(domain) for name in predictors_of(bits)}
        for domain in domains_of(bits)
        if domain != "all"
    }
    summary |= {"wall_seconds": dict(wall_seconds), **others}
    text = json.dumps(_nulled(summary), indent=2, ensure_ascii=True, allow_nan=False)
    write_atomically(epath.Path(path), text + "\n")


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _nulled(value: Any) -> Any:
    """Return value with null for the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _nulled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
