"""Experts on a laptop: film reviews, 8 experts of which a token goes to 2, a shared one beside.

    python -m experiments.pretrain --config=configs/moe_tiny.py --workdir=runs/moe_tiny

As configs/pretrain_tiny.py, with the width of its feed-forward block for each token spread over
experts. Watch train/router_balance (2 where all experts get their share), train/router_z,
train/router_largest_share and train/router_dropped. A CPU multiplies ragged groups of tokens by
every expert, so experts have a capacity here; --config.model.expert_capacity_factor=None takes it
away, and no token is dropped.
"""

from configs import pretrain_tiny


def get_config(arg=None):
    config = pretrain_tiny.get_config()
    config.model.prefix_layers = ("global",)
    config.model.cycle_layers = ("global_moe",)
    config.model.num_layers = 3
    config.model.num_experts = 8
    config.model.experts_per_token = 2
    config.model.expert_mlp_width = 128
    config.model.shared_expert_width = 256
    config.model.expert_capacity_factor = 1.5
    return config
