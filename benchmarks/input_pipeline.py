"""Packed rows a second from the input pipeline alone, on the speedrun's data.

    python -m benchmarks.input_pipeline [--seconds=10]

The last line is one JSON object: tokens a second for row lengths 256 and 1,024.
"""

import json
import time

from absl import app, flags

from configs.dataclass_config import from_config_dict
from configs.schema import PretrainConfig
from configs.speedrun import get_pretrain_config
from llm.data.loader import make_batches
from llm.data.prepare import prepare
from llm.data.tokenizer_training import make_tokenizer

_SECONDS = flags.DEFINE_float("seconds", 10.0, "Measured for each row length.")


def tokens_per_second(prepared, row_length: int) -> float:
    batches = make_batches(prepared.train, None, row_length, 8 * 256 // min(row_length, 256), 0)
    for _ in range(20):
        next(batches)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS.value:
        tokens += next(batches)["tokens"].size
    batches.close()
    return tokens / (time.perf_counter() - start)


def main(_) -> None:
    config = from_config_dict(get_pretrain_config(), PretrainConfig).data
    prepared = prepare(config, make_tokenizer(config))
    print(json.dumps({str(n): round(tokens_per_second(prepared, n)) for n in (256, 1024)}))


if __name__ == "__main__":
    app.run(main)
