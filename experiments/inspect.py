"""Show what a workdir holds: config, parameters, steps, tokens seen, digest.

    python -m experiments.inspect --workdir=runs/tiny [--verify] [--json]

Of a directory that experiments.convert has exported: which run and step it is.
"""

import math
import pathlib

from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments import entry
from experiments.loading import is_workdir, load_model_config, read_config
from llm.interop.export_ledger import export_problems
from llm.interop.export_ledger import read_ledger as read_export
from llm.scaling.accounting import num_active_params, num_params, training_flops_per_token
from llm.training.goodput import read_goodput
from llm.training.loading import load_params, verify
from llm.training.manifests import CHECKPOINTS, list_steps, read_ledger, read_manifest

_WORKDIR = flags.DEFINE_string("workdir", None, "The run to look at.", required=True)
_VERIFY = flags.DEFINE_boolean("verify", False, "Re-read and check every byte of every step.")
_JSON = entry.define_json()


def main() -> None:
    if not is_workdir(_WORKDIR.value) and read_export(pathlib.Path(_WORKDIR.value)):
        inspect_export(pathlib.Path(_WORKDIR.value))
        return
    config, model = read_config(_WORKDIR.value), load_model_config(_WORKDIR.value)
    length = _row_tokens(config) or model.max_length_tokens
    loaded = load_params(_WORKDIR.value)
    steps = epath.Path(_WORKDIR.value) / CHECKPOINTS
    manifest = read_manifest(steps / str(loaded.step))
    ledger = read_ledger(_WORKDIR.value)
    report = {
        "workdir": _WORKDIR.value,
        "config": config,
        "parameters": num_params(model),
        "active_parameters": num_active_params(model),
        "training_flops_per_token": training_flops_per_token(model, length),
        "step": loaded.step,
        "total_steps": manifest.get("total_steps"),
        "tokens_seen": manifest.get("tokens", 0),
        "steps": list_steps(_WORKDIR.value),
        "params_digest": loaded.digest,
        "ledger": ledger,
        "goodput": read_goodput(_WORKDIR.value),
    }
    if _VERIFY.value:
        report["verified"] = verify(_WORKDIR.value)
    if _JSON.value:
        entry.print_json(report)
        return
    _show(report, manifest["arrays"])


def _row_tokens(config: dict) -> int | None:
    """Return the length of the rows that a run learns from, by whichever section says so."""
    sections = (config.get(name) for name in ("data", "comparisons"))
    found = (each.get("length_tokens") for each in sections if isinstance(each, dict))
    return next((length for length in found if isinstance(length, int)), None)


def inspect_export(directory: pathlib.Path) -> None:
    """Show what an exported directory was made from, and whether it still is that."""
    ledger = read_export(directory)
    problems = export_problems(directory) if _VERIFY.value else None
    if _JSON.value:
        verified = {} if problems is None else {"problems": problems}
        entry.print_json({"workdir": str(directory)} | ledger | verified)
        return
    console = Console()
    console.print_json(data=ledger["origin"])
    if problems is not None:
        console.print("\n".join(problems) or f"{len(ledger['files'])} files: each as exported")


def _show(report: dict, arrays: dict[str, dict]) -> None:
    console = Console()
    table = Table("parameter", "shape", "type", "numbers", box=None)
    table.columns[0].no_wrap = True
    for name, array in arrays.items():
        if name.startswith("params/"):
            shape = tuple(array["shape"])
            numbers = f"{math.prod(shape):,}"
            table.add_row(name.removeprefix("params/"), str(shape), array["dtype"], numbers)
    console.print_json(data=report["config"])
    console.print(table)
    console.print(
        f"{report['parameters']:,} parameters ({report['active_parameters']:,} multiply each "
        f"token; padding of the vocabulary left out), "
        f"{report['training_flops_per_token']:.4g} training FLOPs a token"
    )
    console.print(
        f"step {report['step']} of {report['total_steps']}, {report['tokens_seen']:,} tokens seen, "
        f"checkpoints at {report['steps']}"
    )
    console.print(report["goodput"].describe())
    console.print(f"digest of the parameters: {report['params_digest']}")
    for step in report.get("verified", []):
        verdict = "; ".join(step.problems) or "every byte and array as saved"
        console.print(
            f"step {step.step}: {step.num_files} files, {step.num_arrays} arrays: {verdict}"
        )


if __name__ == "__main__":
    entry.run(main)
