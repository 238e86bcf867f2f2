"""Convert a model between our workdirs, Hugging Face directories and GGUF files (those only read).

    python -m experiments.convert --source=smollm2 --target=runs/smollm2
    python -m experiments.convert --source=runs/smollm2 --target=exported --format=huggingface
    python -m experiments.convert --source=runs/lora --target=adapter --format=peft

A workdir made so has its parameters at step 0 and no optimizer: evaluate, generate and chat read
it, and later stages start from it.
"""

from absl import flags
from etils import epath

from configs.dataclass_config import config_to_json
from configs.schema import PretrainConfig
from experiments import entry
from experiments.loading import (
    LoadedModel,
    is_workdir,
    load_model,
    load_model_config,
    load_section,
    origin_of,
    read_config,
)
from llm.data.config import DataConfig, TokenizerConfig
from llm.interop.huggingface import save_huggingface
from llm.interop.peft import save_peft
from llm.models.config import AdapterConfig
from llm.models.transformer import Transformer
from llm.training.checkpoints import Checkpointer
from llm.training.files import is_local, write_atomically
from llm.training.loading import load_params

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "A workdir, a Hugging Face directory, a GGUF file, or 'smollm2'.",
    required=True,
)
_TARGET = flags.DEFINE_string("target", None, "The directory to write.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    ["workdir", "huggingface", "peft"],
    "What to write; default: huggingface from a workdir, a workdir from anything else. A workdir's "
    "adapter is merged, but for peft, which holds nothing else.",
)
_BASE_MODEL = flags.DEFINE_string(
    "base_model", None, "With --format=peft: the Hugging Face directory that it adapts."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the source workdir; default: its newest good one."
)
_EMA = flags.DEFINE_boolean("ema", False, "Take the source workdir's averaged parameters.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of the weights in a Hugging Face directory."
)
_MAX_SHARD = flags.DEFINE_integer(
    "max_shard_bytes", 5_000_000_000, "Size of a Hugging Face weight file at most.", 1
)


def main() -> None:
    kind = _FORMAT.value or ("huggingface" if is_workdir(_SOURCE.value) else "workdir")
    target = epath.Path(_TARGET.value)
    if kind != "workdir" and not is_local(target):
        raise ValueError(f"--target={target}: {kind} files are written to a local disk; copy them")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--target={target} exists and is not empty; name another, or remove it")
    if kind == "peft":
        save_adapter(target)
        return
    model = load_model(_SOURCE.value, step=_STEP.value, ema=_EMA.value)
    if kind == "workdir":
        save_workdir(target, model)
    else:
        save_huggingface(
            target,
            model.config,
            model.params,
            model.tokenizer,
            dtype=_DTYPE.value,
            max_shard_bytes=_MAX_SHARD.value,
            origin=model.origin,
        )
    print(f"{_SOURCE.value} → {target} ({kind})")


def save_adapter(target: epath.Path) -> None:
    """Write the low-rank factors of a workdir as a PEFT adapter of its base model."""
    if not is_workdir(_SOURCE.value):
        raise ValueError(f"--format=peft: {_SOURCE.value} is not a workdir")
    base = _BASE_MODEL.value or read_config(_SOURCE.value).get("source", "")
    if not (epath.Path(base) / "config.json").exists() or is_workdir(base):
        raise ValueError(
            f"--base_model={base or None}: PEFT needs the base model as a Hugging Face directory; "
            "convert it first, then name it"
        )
    adapter = load_section(_SOURCE.value, "adapter", AdapterConfig, default=AdapterConfig())
    model = Transformer(load_model_config(_SOURCE.value), adapter=adapter)
    loaded = load_params(_SOURCE.value, _STEP.value, ema=_EMA.value)
    origin = origin_of(_SOURCE.value, loaded, ema=_EMA.value)
    save_peft(target, model, loaded.params, base, origin=origin)
    print(f"{_SOURCE.value} → {target} (peft, over {base})")


def save_workdir(target: epath.Path, model: LoadedModel) -> None:
    """Write tokenizer, one checkpoint, and last config.json, which makes it a workdir."""
    tokenizer = TokenizerConfig(kind="file", path=str(target / "tokenizer"))
    length = min(model.config.max_length_tokens, DataConfig().length_tokens)
    data = DataConfig(tokenizer=tokenizer, length_tokens=length)
    config = PretrainConfig(model=model.config, data=data, total_steps=1)
    model.tokenizer.save(target / "tokenizer")
    checkpointer = Checkpointer(target)
    checkpointer.save(0, {"params": model.params}, {"origin": dict(model.origin)})
    checkpointer.close()
    write_atomically(target / "config.json", config_to_json(config))


if __name__ == "__main__":
    entry.run(main)
