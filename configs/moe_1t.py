"""A trillion parameters, 34B of each token (Kimi K2's shape), for 4,096 chips.

    python -m experiments.pretrain --config=configs/moe_1t.py --workdir=gs://BUCKET/moe_1t \
        --config.data.tokenizer.path=DIR_OF_TOKENIZER

Source of shape, batch, rates and decay: Moonshot AI 2025, arXiv:2507.20534, sections 2.3 to 2.5.
Its Muon, which clips attention logits besides, multiplies updates by 0.2 times the root of a
matrix's larger side: at 7,168 and a rate of 2e-4 that is 3.4e-3 of ours. Experts take at most 1.25
times their mean load: buffers that hold whatever comes would be 32 times as large over 32 devices.
"""

from configs.published import published


def get_config(arg=None):
    config = published(
        "moe-1t",
        total_tokens=15_500_000_000_000,
        batch_sequences=16_384,
        learning_rate=3.4e-3,
        dataset="HuggingFaceFW/fineweb",
    )
    config.model.expert_capacity_factor = 1.25
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, -1, 32
    config.compute.remat = "full"
    config.data.tokenizer.kind, config.data.tokenizer.path = "file", "tokenizers/kimi_k2"
    config.optimizer.name = "muon"
    config.optimizer.weight_decay = 0.1 * 2e-4 / 3.4e-3
    config.optimizer.adam_learning_rate = 2e-4
    config.schedule.name = "warmup_stable_decay"
    config.schedule.warmup_steps = 500
    config.schedule.decay_tokens = 5_500_000_000_000
    config.schedule.final_fraction = 0.1
    config.router_balance_weight = 0.001
    return config
