"""Tokenise a recipe's data ahead of a run, and say what is in them: sizes, duplicates, fill rate.

    python -m experiments.prepare_data --config=configs/pretrain_tiny.py

Runs do this themselves when they start; here it is apart, for large data or to look at them.
Killed and started again it goes on where it was. `--config.data.num_workers=8` tokenises in eight
processes. Bad rows, and held-out text that nearly occurs in training, stop it above a limit.
"""

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from configs.schema import PretrainConfig
from experiments import entry
from llm.data.config import DataConfig
from llm.data.prepare import Prepared, prepare
from llm.data.split_rows import SplitRows
from llm.data.tokenizer_training import make_tokenizer

_DIRECTORY = flags.DEFINE_string(
    "directory", None, "Where the prepared data go; by default where runs look for them."
)
_JSON = entry.define_json()


def main(config: PretrainConfig) -> None:
    tokenizer = make_tokenizer(config.data)
    prepared = prepare(config.data, tokenizer, _DIRECTORY.value)
    report = describe(config.data, prepared)
    if _JSON.value:
        entry.print_json(report)
    else:
        _show(report)


def describe(config: DataConfig, prepared: Prepared) -> dict:
    """Return sizes, what was dropped, leaks, and how full the rows are, by split and source.

    Makes the pack plans of this row length, which a run then finds made.
    """
    report = {
        "path": str(prepared.path),
        "row_length_tokens": config.length_tokens,
        "bad_rows": prepared.report["bad_rows"],
    }
    for split, splits in (("train", prepared.train), ("validation", prepared.validation)):
        report[split] = {}
        for name, documents in splits.items():
            seed = config.seed if split == "train" else 0  # as the loader's
            rows = SplitRows(documents, config.length_tokens, seed)
            counts = prepared.report[split][name]
            report[split][name] = {
                **counts,
                "bytes_per_token": counts["bytes"] / max(1, counts["tokens"]),
                "rows": rows.num_rows,
                "fill_rate": rows.fill_rate,
            }
    return report


def _show(report: dict) -> None:
    console = Console(soft_wrap=True)
    columns = ("source", "split", "documents", "dropped", "tokens", "bytes/token", "rows", "filled")
    table = Table(*columns, box=box.SIMPLE, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for split in ("train", "validation"):
        for name, counts in report[split].items():
            dropped = sum(count for key, count in counts.items() if key.startswith("dropped"))
            table.add_row(
                name, split, f"{counts['documents']:,}", f"{dropped:,}", f"{counts['tokens']:,}",
                f"{counts['bytes_per_token']:.3f}", f"{counts['rows']:,}",
                f"{counts['fill_rate']:.2%}",
            )  # fmt: skip
    console.print(table)
    for name, counts in report["validation"].items():
        equal = report["train"].get(name, {}).get("dropped_equal_to_held_out", 0)
        console.print(
            f"{name}: {counts['near_duplicates']} of {counts['checked']} held-out documents nearly "
            f"occur in training text; {equal} training documents that equal one were dropped"
        )
        for example in counts["near_duplicate_examples"]:
            console.print(
                f"  {example['share']:.0%} of {example['held_out']} in {example['training']}"
            )
    for name, bad_rows in report["bad_rows"].items():
        if bad_rows["count"]:
            console.print(f"{name}: {bad_rows['count']} bad rows skipped, the first:")
            for source, row, reason in bad_rows["rows"][:5]:
                console.print(f"  {source}:{row} {reason}", markup=False)
    console.print(f"rows of {report['row_length_tokens']} tokens; prepared in {report['path']}")


if __name__ == "__main__":
    entry.run(main, PretrainConfig)
