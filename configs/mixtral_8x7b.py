"""A Mixtral 8×7B shape on 350B tokens of FineWeb, on 64 chips or more, an expert on each 8th.

    python -m experiments.pretrain --config=configs/mixtral_8x7b.py --workdir=gs://BUCKET/mixtral \
        --config.data.tokenizer.path=DIR_OF_MIXTRAL_TOKENIZER

Dropless, as the paper's. Source of the shape: Jiang et al. 2024, arXiv:2401.04088, table 1; it does
not tell how the model was trained: rate and batch are Llama 2's for its like, the balance's weight
is the released config.json's.
"""

from configs.published import published


def get_config(arg=None):
    config = published(
        "mixtral-8x7b",
        total_tokens=350_000_000_000,
        batch_sequences=1024,
        learning_rate=3e-4,
        dataset="HuggingFaceFW/fineweb:sample-350BT",
    )
    config.data.length_tokens = 4096
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, -1, 8
    config.compute.remat = "full"
    config.accumulate_steps = 2  # on 64 chips: eight sequences each at a time
    config.data.tokenizer.kind, config.data.tokenizer.path = "file", "tokenizers/mixtral"
    config.router_balance_weight = 0.02
    config.schedule.warmup_steps = 2000
    return config
