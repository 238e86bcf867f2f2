"""Plan a run before paying for it: does it fit, how long does it take, what does it cost?

    python -m experiments.plan --config=configs/llama3_8b.py --slice=v5p:4x4x4

Slices are v5e:16x16, v5p:8x8x8, v6e:16x16, 4*v5e:16x16 (four, joined by the data centre's
network), h100:64. For TPUs the step is also compiled, without one being here, which takes minutes
(extra [tpu]); --nocompile leaves that out. --search tries meshes, microbatches and remat policies.
Ladders, studies and the stages after pretraining are planned by compiling them alone; the model of
these may not be here yet: --model=configs/llama3_8b.py says what its shape will be.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever is planned for, this runs here
# JAX 0.10 writes what is compiled ahead into its cache, and cannot read it back without a TPU.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

from absl import flags

from configs.schema import (
    DirectPreferenceConfig,
    EmergenceConfig,
    FinetuneConfig,
    PretrainConfig,
    RewardModelConfig,
    RlhfConfig,
    ScalingConfig,
    SpeedrunConfig,
)
from experiments import entry
from experiments.plan_report import (
    candidates_text,
    overrides_text,
    plan_text,
    programs_text,
    report_on,
)
from experiments.plan_search import changes, search
from experiments.plan_step import DoesNotFit, compile_step, planned
from llm.scaling.hardware import Slice, parse_slice
from llm.training.ahead import topology_devices

_SLICE = flags.DEFINE_string("slice", None, "As v5e:16x16, v5p:8x8x8, h100:64.", required=True)
_COMPILE = flags.DEFINE_boolean("compile", True, "Compile the step for the slice, if of TPUs.")
_SEARCH = flags.DEFINE_boolean("search", False, "Look for a better mesh, microbatch and remat.")
_NUM_COMPILED = flags.DEFINE_integer(
    "num_compiled", 3, "Of --search, how many of the best are compiled.", lower_bound=1
)
_MODEL = flags.DEFINE_string(
    "model",
    "",
    "Of stages after pretraining, what has their model's shape, if not config.source: a recipe of "
    "pretraining, a workdir, a Hugging Face directory, a .gguf file, or smollm2.",
)
_JSON = entry.define_json()
_STAGES = FinetuneConfig, RewardModelConfig, DirectPreferenceConfig, RlhfConfig


def main(config) -> None:
    where = parse_slice(_SLICE.value)
    if isinstance(config, SpeedrunConfig):
        config = config.pretrain
    if _MODEL.value and not isinstance(config, _STAGES):
        raise ValueError("--model is of the stages after pretraining: this config has its own")
    if not isinstance(config, PretrainConfig):
        _check_compiles(where)
    if isinstance(config, ScalingConfig | EmergenceConfig):
        report = plan_programs(config, where)
    elif isinstance(config, _STAGES):
        report = plan_stage(config, where)
    elif _SEARCH.value:
        report = plan_search(config, where)
    else:
        report = plan_run(config, where)
    if _JSON.value:
        entry.print_json(report)


def _check_compiles(where: Slice) -> None:
    if not where.topology or not _COMPILE.value or _SEARCH.value:
        raise ValueError(
            "only recipes of pretraining are planned by formulas: others by compiling them, for "
            "slices of TPUs, without --nocompile and --search"
        )


def plan_run(config: PretrainConfig, where: Slice) -> dict:
    """Print the plan of a run, and return it."""
    report = report_on(config, where, compile_it=_COMPILE.value)
    print(plan_text(report), flush=True)
    return report


def plan_search(config: PretrainConfig, where: Slice) -> dict:
    """Print the best meshes, microbatches and remat policies, and return them."""
    candidates = search(config, where)
    to_compile = _NUM_COMPILED.value if _COMPILE.value and where.topology else 0
    reports, best, num_compiled = [], None, 0
    for candidate in candidates[: max(8, 2 * to_compile)]:
        report = report_on(candidate.config, where, compile_it=num_compiled < to_compile)
        num_compiled += "compiled" in report
        if best is None and report["fits"]:
            best = overrides_text(changes(config, candidate.config))
        reports.append(report)
    print(candidates_text(reports, len(candidates)))
    if best is None:
        raise ValueError(
            f"the compiler finds no room for any of the {len(reports)} best; take more chips"
        )
    print(f"\nbest:\n    {best}", flush=True)
    return {"best": best, "tried": len(candidates), "candidates": reports}


def plan_programs(config: ScalingConfig | EmergenceConfig, where: Slice) -> dict:
    """Print what the programs of a ladder's or a study's groups need, and return it."""
    from experiments.plan_programs import ladder_programs, study_programs

    devices = topology_devices(where.topology, where.num_slices)
    make = ladder_programs if isinstance(config, ScalingConfig) else study_programs
    rows, tried = [], {}
    for program in make(config, devices):
        if program.key not in tried:
            try:
                found = compile_step(*program.lower())
                tried[program.key] = {
                    "fits": True,
                    "state_gb": found.memory.state / 1e9,
                    "temporary_gb": found.memory.temporaries / 1e9,
                    "height_gb": found.memory.height / 1e9,
                    "kernels": found.kernels,
                    "compile_seconds": found.seconds,
                }
            except DoesNotFit as error:
                tried[program.key] = {"fits": False, "compiler": str(error)}
        row = {"group": program.name, "params": program.params, "runs": program.runs}
        row |= tried[program.key]
        if program.recipe is not None:
            plan = planned(program.recipe, where)
            row |= {"predicted_gb": plan.memory.total / 1e9, "mfu_bound": plan.mfu_bound}
            row["days"] = program.recipe.num_steps * plan.time.predicted / 86400
        rows.append(row)
        print(programs_text(row, first=len(rows) == 1), flush=True)
    return {"slice": where.name, "chips": where.num_chips, "groups": rows}


def plan_stage(config, where: Slice) -> dict:
    """Print what the programs of a stage after pretraining need and take, and return it."""
    from experiments.plan_stage_report import report_on_stage, stage_text

    report = report_on_stage(config, where, _MODEL.value)
    print(stage_text(report), flush=True)
    return report


if __name__ == "__main__":
    entry.run(main, (PretrainConfig, ScalingConfig, EmergenceConfig, SpeedrunConfig, *_STAGES))
