"""Policy gradients on SmolLM2-135M against a learnt reward: reviews that follow what was asked.

    python -m experiments.rlhf --config=configs/rlhf_smollm2.py --workdir=runs/smollm2_rlhf

From the models of `finetune_smollm2` and `reward_smollm2`. The policy learns low-rank factors, so
that policy and reference are one copy of the weights.
"""

from configs import rlhf_tiny
from configs.dataclass_config import to_config_dict
from configs.schema import RlhfConfig
from llm.rl.config import RewardConfig


def get_config(arg=None):
    rewards = {"reward": RewardConfig(kind="model", path="runs/smollm2_reward")}
    config = to_config_dict(RlhfConfig(source="runs/smollm2_chat", rewards=rewards))
    config.prompts = rlhf_tiny.get_config().prompts
    config.algorithm.name = "rloo"
    config.rollout.prompts = 64
    config.rollout.group = 4
    config.rollout.prompt_tokens = 64
    config.rollout.response_tokens = 128
    config.algorithm.minibatches = 4
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.compute.remat = "dots_with_no_batch"
    config.compute.unroll_layers = False
    config.optimizer.learning_rate = 1e-4
    config.kl.coefficient = 0.05
    config.total_steps = 200
    config.run.log_every_steps = 1
    config.run.save_every_steps = 20
    return config
