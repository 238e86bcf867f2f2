"""The five phenomena nearer to the papers' sizes, for one data-centre GPU: up to 85M parameters.

python -m experiments.emergence --config=configs/emergence_gpu.py --workdir=runs/emergence_gpu

With an argument, as in configs/emergence_gpu.py:addition, that one alone. Not run: no GPU was here.
"""

import dataclasses

from configs.dataclass_config import to_config_dict
from configs.emergence import adder, addition, chosen, few_shot, grokking, induction, parity, small
from configs.schema import EmergenceConfig
from llm.training.config import OptimizerConfig, ScheduleConfig


def get_config(arg=None):
    return to_config_dict(EmergenceConfig(**chosen(sections(), arg)))


def sections() -> dict:
    return {
        # Nanda et al. 2023: 30% of the pairs modulo 113; the optimizer is ours.
        "grokking": grokking(modulus=113, train_fraction=0.3, total_steps=30_000, seeds=range(8)),
        # Lee et al. 2023, figure 3: 10.6M parameters; 5,000 samples gave 81% plain, 99.8% reversed.
        "addition": dataclasses.replace(
            addition(),
            digits=(3,),
            num_examples=(1000, 2500, 5000, 10_000),
            num_held_out=1000,
            batch_sequences=256,
            total_steps=5000,
            models={
                f"{layers}x{width}": adder(width, num_layers=layers, head_dim=64)
                for width, layers in ((128, 4), (256, 6), (384, 6), (768, 12))
            },
            optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.99),
            schedule=ScheduleConfig(name="cosine", warmup_steps=100),
        ),
        "induction": dataclasses.replace(
            induction(width=512, head_dim=64, vocab=512, length_tokens=512),
            batch_sequences=64,
            total_steps=5000,
        ),
        # Michaud et al. 2023, section 3: 500 subtasks of 100 bits, batches of 20,000.
        "parity": dataclasses.replace(
            parity(),
            num_subtasks=500,
            num_bits=100,
            batch_rows=20_000,
            total_steps=100_000,
            widths=(16, 32, 64, 128, 256, 512, 1024),
        ),
        "few_shot": dataclasses.replace(
            few_shot(),
            word_letters=5,
            shots=(0, 1, 2, 4, 8),
            batch_sequences=128,
            total_steps=20_000,
            models={
                f"{layers}x{width}": small(width, num_layers=layers, vocab=28, head_dim=64)
                for width, layers in ((64, 2), (128, 4), (256, 6), (512, 8), (768, 12))
            },
            optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.98),
        ),
    }
