"""The flags of everything that speaks: which model, and how its tokens are drawn."""

import jax
from absl import flags

from experiments.loading import load_model
from llm.generation.config import SamplingConfig
from llm.generation.generator import Generator
from llm.models.config import ComputeConfig
from llm.models.transformer import Transformer
from llm.models.unstack import unstack, unstacked

_WORKDIR = flags.DEFINE_string("workdir", None, "The run whose model speaks.")
_MODEL = flags.DEFINE_string(
    "model", None, "Instead: a Hugging Face directory, a GGUF file, or 'smollm2'."
)
_STEP = flags.DEFINE_integer("step", None, "A workdir's step; default: the newest good one.", 0)
_EMA = flags.DEFINE_boolean("ema", False, "Take a workdir's averaged parameters.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write at most.", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token.", 0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "Only the k likeliest tokens.", 1)
_TOP_P = flags.DEFINE_float("top_p", None, "Only the likeliest tokens of this much probability.")
_MIN_P = flags.DEFINE_float("min_p", None, "Only tokens this likely, relative to the likeliest.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: fewer tokens said before.")
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")


def load_generator() -> tuple[Generator, dict, jax.Array]:
    """Return a generator, its parameters on the device, and the random key."""
    source = _WORKDIR.value or _MODEL.value
    if not source or (_WORKDIR.value and _MODEL.value):
        raise ValueError("give --workdir=DIR or --model=SOURCE, one of the two")
    sampling = SamplingConfig(
        max_new_tokens=_MAX_NEW.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_PENALTY.value,
    )
    loaded = load_model(source, step=_STEP.value, ema=_EMA.value)
    model = Transformer(loaded.config, ComputeConfig(dtype=_DTYPE.value))
    params = jax.device_put(unstack(model, loaded.params))
    generator = Generator(unstacked(model), loaded.tokenizer, sampling)
    return generator, params, jax.random.key(_SEED.value)
