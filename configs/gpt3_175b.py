"""GPT-3 175B: 300B tokens in batches of 3.2M, on 512 chips (fsdp 64 × tensor 8).

    python -m experiments.pretrain --config=configs/gpt3_175b.py --workdir=gs://BUCKET/gpt3_175b

The paper grows its batch over the first 12B tokens and mixes five corpora; here the batch is whole
from the start and the corpus is FineWeb. Source: Brown et al. 2020, table 2.1 and appendix B.
"""

from configs.published import published


def get_config(arg=None):
    config = published(
        "gpt3-175b",
        total_tokens=300_000_000_000,
        batch_sequences=1536,
        learning_rate=0.6e-4,
        dataset="HuggingFaceFW/fineweb:sample-350BT",
    )
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, -1, 8
    config.compute.remat = "full"
    config.accumulate_steps = 4  # else the layers' inputs alone take 116 GB a chip
    config.schedule.warmup_tokens = 375_000_000
    return config
