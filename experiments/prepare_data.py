"""Tokenise a recipe's data ahead of a run, and say what is in them: sizes, duplicates, fill rate.

    python -m experiments.prepare_data --config=configs/pretrain_tiny.py

Runs do this themselves when they start; here it is apart, for large data or to look at them.
Killed and started again it goes on where it was. `--config.data.num_workers=8` tokenises in eight
processes. Bad rows, and held-out text that nearly occurs in training, stop it above a limit.

    python -m experiments.prepare_data --config=configs/pretrain_tiny.py --beam \
        --directory=gs://bucket/prepared \
        --beam_options="--runner=DataflowRunner --project=P --region=R --setup_file=./setup.py"

does the same as an Apache Beam job on many machines (pip install -e '.[beam]'), and leaves the same
files; without --beam_options it runs here. docs/data_at_10T_tokens.md plans one for a large corpus.
"""

import functools
import logging
import shlex
from collections.abc import Callable

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from configs.schema import PretrainConfig
from experiments import entry
from llm.data.config import DataConfig
from llm.data.prepare import Prepared, prepare
from llm.data.split_rows import SplitRows, plan_seed
from llm.data.tokenizer_training import make_tokenizer

_DIRECTORY = flags.DEFINE_string(
    "directory", None, "Where the prepared data go; by default where runs look for them."
)
_BEAM = flags.DEFINE_boolean("beam", False, "Prepare the data as an Apache Beam job.")
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options",
    "",
    "With --beam: Beam's own options, as on its command line. Without a --runner there it runs in "
    "this process, whatever data.num_workers is.",
)
_JSON = entry.define_json()


def main(config: PretrainConfig) -> None:
    prepare_data = choose_preparation(_BEAM.value, _BEAM_OPTIONS.value)
    tokenizer = make_tokenizer(config.data)
    prepared = prepare_data(config.data, tokenizer, _DIRECTORY.value)
    report = describe(config.data, prepared)
    if _JSON.value:
        entry.print_json(report)
    else:
        _show(report)


def choose_preparation(beam: bool, beam_options: str) -> Callable[..., Prepared]:
    """Return what prepares data: processes of this machine, or a Beam job.

    Raises:
      ValueError: there are options for Beam, which is not asked for or not installed.
    """
    if not beam:
        if beam_options:
            raise ValueError(f"--beam_options={beam_options!r} are for --beam; give that too")
        return prepare
    logging.disable(logging.WARNING)  # at its import Beam misses packages for Google's services
    try:
        from llm.data.prepare_beam import prepare_with_beam
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--beam needs the package apache-beam ({error}): pip install -e '.[beam]'"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return functools.partial(prepare_with_beam, options=shlex.split(beam_options))


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
            rows = SplitRows(documents, config.length_tokens, plan_seed(config, split))
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
