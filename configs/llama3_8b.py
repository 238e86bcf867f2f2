"""A Llama-3 8B shape on 350B tokens of FineWeb, on 64 chips or more, parameters split over all.

    python -m experiments.pretrain --config=configs/llama3_8b.py --workdir=gs://BUCKET/llama3_8b \
        --config.data.tokenizer.path=DIR_OF_LLAMA3_TOKENIZER

Source of shape and peak rate: Grattafiori et al. 2024, arXiv:2407.21783, table 3.
"""

from configs.published import published


def get_config(arg=None):
    config = published(
        "llama3-8b",
        total_tokens=350_000_000_000,
        batch_sequences=512,
        learning_rate=3e-4,
        dataset="HuggingFaceFW/fineweb:sample-350BT",
    )
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.compute.remat = "dots_with_no_batch"
    config.accumulate_steps = 8  # on 64 chips: a sequence each at a time
    config.data.tokenizer.kind, config.data.tokenizer.path = "file", "tokenizers/llama3"
    config.schedule.warmup_steps = 2000
    return config
