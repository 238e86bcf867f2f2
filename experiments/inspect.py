"""Show what a workdir holds: config, parameters, steps, tokens seen, digest.

python -m experiments.inspect --workdir=runs/tiny [--verify] [--json]
"""

import math

from absl import flags
from rich.console import Console
from rich.table import Table

from configs.dataclass_config import load_workdir_config
from configs.schema import PretrainConfig
from experiments import entry
from llm.models.transformer import Transformer, logical_axes, param_shapes
from llm.scaling.accounting import num_active_params, num_params, training_flops_per_token
from llm.training.loading import load_params, verify
from llm.training.manifests import list_steps, read_ledger

_WORKDIR = flags.DEFINE_string("workdir", None, "The run to look at.", required=True)
_VERIFY = flags.DEFINE_boolean("verify", False, "Re-read and check every byte of every step.")
_JSON = entry.define_json()


def main() -> None:
    config = load_workdir_config(_WORKDIR.value, PretrainConfig)
    loaded = load_params(_WORKDIR.value)
    ledger = read_ledger(_WORKDIR.value)
    report = {
        "workdir": _WORKDIR.value,
        "config": config,
        "parameters": num_params(config.model),
        "active_parameters": num_active_params(config.model),
        "training_flops_per_token": training_flops_per_token(
            config.model, config.data.length_tokens
        ),
        "step": loaded.step,
        "total_steps": config.num_steps,
        "tokens_seen": loaded.step * config.tokens_per_step,
        "steps": list_steps(_WORKDIR.value),
        "params_digest": loaded.digest,
        "ledger": ledger,
    }
    if _VERIFY.value:
        report["verified"] = verify(_WORKDIR.value)
    if _JSON.value:
        entry.print_json(report)
        return
    _show(config, report)


def _show(config: PretrainConfig, report: dict) -> None:
    console = Console()
    model = Transformer(config.model)
    axes = _flat(logical_axes(model))
    table = Table("parameter", "shape", "axes", "numbers", box=None)
    table.columns[0].no_wrap = True
    for path, shape in _flat(param_shapes(model)).items():
        table.add_row(path, str(shape.shape), " ".join(axes[path]), f"{math.prod(shape.shape):,}")
    console.print_json(data=entry.plain(config))
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
    console.print(f"digest of the parameters: {report['params_digest']}")
    for step in report.get("verified", []):
        verdict = "; ".join(step.problems) or "every byte and array as saved"
        console.print(
            f"step {step.step}: {step.num_files} files, {step.num_arrays} arrays: {verdict}"
        )


def _flat(tree, prefix: str = "") -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, child in tree.items():
        flat |= _flat(child, f"{prefix}/{name}" if prefix else name)
    return flat


if __name__ == "__main__":
    entry.run(main)
