"""GPT-2 124M on 10B tokens of FineWeb-Edu, with GPT-3's hyperparameters for this size.

    python -m experiments.pretrain --config=configs/gpt2_124m.py --workdir=gs://BUCKET/gpt2_124m

Half a million tokens a step. One GPU of 80 GB holds 64 sequences at a time: accumulate_steps 8.
Source of shape and batch: Radford et al. 2019; of rates: Brown et al. 2020, table 2.1.
"""

from configs.published import published


def get_config(arg=None):
    config = published(
        "gpt2-124m",
        total_tokens=10_000_000_000,
        batch_sequences=512,
        learning_rate=6e-4,
        dataset="HuggingFaceFW/fineweb-edu:sample-10BT",
    )
    config.accumulate_steps = 8
    config.schedule.warmup_steps = 700
    config.compute.unroll_layers = True
    return config
