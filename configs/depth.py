"""Our own models by one dial: `--config=configs/depth.py:12` is 12 layers, 768 wide.

    python -m experiments.pretrain --config=configs/depth.py:12 --workdir=runs/d12

Depth gives everything: width (64 a layer), heads, batch, tokens (20 a parameter, Hoffmann et al.
2022, arXiv:2203.15556) and AdamW's rate for the tables, which falls with the root of the width;
Muon's needs no such rule, since its updates have the same size at every width.
"""

import math

from configs.dataclass_config import to_config_dict
from configs.published import published
from llm.models.presets import from_depth


def get_config(arg="12"):
    depth = int(arg)
    model = from_depth(depth, vocab_size=50257, max_length_tokens=1024)
    num_params = depth * 12 * model.width**2 + model.vocab_size * model.width  # the head counted
    config = published(
        "gpt2-124m",
        total_tokens=20 * num_params,
        batch_sequences=max(8, 2 ** round(math.log2(512 * depth / 12))),
        learning_rate=0.02,
        dataset="HuggingFaceFW/fineweb-edu:sample-100BT",
    )
    config.model = to_config_dict(model)
    config.accumulate_steps = max(1, config.data.batch_sequences // 64)
    config.optimizer.name = "muon"
    config.optimizer.beta1 = 0.95
    config.optimizer.adam_learning_rate = 3e-3 * (768 / model.width) ** 0.5
    config.schedule.name = "warmup_stable_decay"
    config.schedule.warmup_steps = 100
    config.schedule.decay_tokens = 8 * num_params
    config.schedule.final_fraction = 0.0
    return config
