"""Answer the tasks of lm-evaluation-harness with any of our models: pip install '.[harness]'.

    python -m experiments.harness --model=runs/tiny --tasks=hellaswag,lambada_openai --limit=100
    python -m experiments.harness --model=smollm2 --include_path=my_tasks --tasks=mine --json
    python -m experiments.harness --model=hf_directory --tasks=ifeval --apply_chat_template

Tasks are the harness's own, which it fetches from the Hugging Face hub, and those in the YAML files
below --include_path, whose data may be here. Scores are what the harness's `hf` model gives for the
same weights.
"""

import difflib
import json
import logging

import jax
from absl import flags
from etils import epath

from experiments import entry
from experiments.loading import load_model
from llm.models.config import ComputeConfig
from llm.models.transformer import Transformer
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh

_MODEL = flags.DEFINE_string(
    "model", None, "A workdir, a Hugging Face directory, a GGUF file, or 'smollm2'.", required=True
)
_TASKS = flags.DEFINE_list("tasks", [], "Names of tasks or groups, with commas.")
_INCLUDE = flags.DEFINE_multi_string("include_path", [], "A folder of more tasks; repeatable.")
_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before each question.", 0)
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first so many questions of a task.", 1)
_CHAT = flags.DEFINE_boolean("apply_chat_template", False, "Ask through the model's template.")
_SYSTEM = flags.DEFINE_string("system_instruction", None, "What the chat begins with.")
_GENERATION = flags.DEFINE_string(
    "gen_kwargs", None, "Over the tasks' own: max_gen_toks=64,temperature=0.8,do_sample=true"
)
_LENGTH = flags.DEFINE_integer("max_length", None, "Window in tokens; default: the model's.", 2)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Requests at a time.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same draws.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "A file for the scores with every question and answer, as JSON."
)
_JSON = entry.define_json()


def main() -> None:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from llm.evaluation.harness import HarnessModel
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install 'ontogeny-llm[harness]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its notes, not its errors
    for folder in _INCLUDE.value:
        if not epath.Path(folder).is_dir():
            raise FileNotFoundError(f"--include_path={folder}: no such folder")
    known = TaskManager(include_path=_INCLUDE.value or None)
    _check_tasks(known.all_tasks)
    if _OUTPUT.value and not epath.Path(_OUTPUT.value).parent.is_dir():
        raise FileNotFoundError(f"--output={_OUTPUT.value}: its folder does not exist")

    config, params, tokenizer, _ = load_model(_MODEL.value)
    if _LENGTH.value and config.positions == "learned" and _LENGTH.value > config.max_length_tokens:
        raise ValueError(
            f"--max_length={_LENGTH.value}: the model has {config.max_length_tokens} positions"
        )
    model = HarnessModel(
        Transformer(config, ComputeConfig(dtype=_DTYPE.value)),
        params,
        tokenizer,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        max_length=_LENGTH.value,
        batch_size=_BATCH.value,
        seed=_SEED.value,
    )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(_TASKS.value),
        task_manager=known,
        num_fewshot=_FEWSHOT.value,
        limit=_LIMIT.value,
        apply_chat_template=_CHAT.value,
        system_instruction=_SYSTEM.value,
        gen_kwargs=_GENERATION.value,
        log_samples=bool(_OUTPUT.value),
    )
    scores = {name: _figures(row) for name, row in found["results"].items()}
    if _OUTPUT.value:
        whole = {"results": scores, "versions": found["versions"], "samples": found["samples"]}
        epath.Path(_OUTPUT.value).write_text(json.dumps(entry.plain(whole), default=str))
    if _JSON.value:
        entry.print_json({"results": scores, "versions": found["versions"]})
        return
    for name, figures in scores.items():
        for metric, value in figures.items():
            print(f"{name}: {metric} {value:.4f}")


def _check_tasks(known: list[str]) -> None:
    if not _TASKS.value:
        raise ValueError("give --tasks=NAME,…: lm_eval ls tasks lists the harness's own")
    for name in _TASKS.value:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists them"
            raise ValueError(f"--tasks={name}: no such task; {hint}")


def _figures(row: dict) -> dict[str, float]:
    """Return a task's metrics by name: 'acc', 'acc_stderr', 'exact_match (strict)', …"""
    figures = {}
    for key, value in row.items():
        metric, _, part = key.partition(",")
        if isinstance(value, (int, float)) and "," in key:
            figures[metric if part in ("", "none") else f"{metric} ({part})"] = float(value)
    return figures


if __name__ == "__main__":
    entry.run(main)
