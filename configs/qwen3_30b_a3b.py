"""A Qwen3-30B-A3B shape on 350B tokens of FineWeb, on 64 chips or more, 16 experts to each 8th.

    python -m experiments.pretrain --config=configs/qwen3_30b_a3b.py --workdir=gs://BUCKET/qwen3 \
        --config.data.tokenizer.path=DIR_OF_QWEN3_TOKENIZER

Source of the shape: Yang et al. 2025, arXiv:2505.09388, table 2, and the released config.json; the
balance is asked of the whole global batch there too. Rate and batch are not published: these are
DeepSeekMoE's for 16B (Dai et al. 2024, arXiv:2401.06066, section 5.1.2); the balance's weight is
config.json's.
"""

from configs.published import published


def get_config(arg=None):
    config = published(
        "qwen3-30b-a3b",
        total_tokens=350_000_000_000,
        batch_sequences=4608,
        learning_rate=4.2e-4,
        dataset="HuggingFaceFW/fineweb:sample-350BT",
    )
    config.data.length_tokens = 4096
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, -1, 8
    config.compute.remat = "full"
    config.data.tokenizer.kind, config.data.tokenizer.path = "file", "tokenizers/qwen3"
    config.router_balance_weight = 0.001
    config.schedule.warmup_steps = 2000
    return config
