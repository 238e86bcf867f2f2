"""A model as it comes out of a file: config, parameters, tokenizer. Interop floor."""

import dataclasses

from llm.data.tokenizers import Tokenizer
from llm.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What every loader here returns.

    `params` is the model's nested dict of float32 NumPy arrays on the host; put it on the devices
    once (`jax.device_put(params, shardings)`) before calling a jitted function many times.
    """

    config: TransformerConfig
    params: dict
    tokenizer: Tokenizer | None  # None: the files came without one
