"""A reward model from SmolLM2-135M: is a film review as positive as it was asked to be?

    python -m experiments.reward --config=configs/reward_smollm2.py --workdir=runs/smollm2_reward

From the model of `finetune_smollm2`.
"""

from configs import reward_tiny
from configs.dataclass_config import to_config_dict
from configs.schema import RewardModelConfig


def get_config(arg=None):
    config = to_config_dict(RewardModelConfig(source="runs/smollm2_chat", total_epochs=3.0))
    config.comparisons = reward_tiny.get_comparisons()
    config.comparisons.batch_prompts = 4
    config.comparisons.max_responses = 16
    config.compute.remat = "dots_with_no_batch"
    config.compute.unroll_layers = False
    config.optimizer.learning_rate = 1e-5
    config.dropout_rate = 0.1
    config.evaluate_every_steps = 50
    config.run.save_every_steps = 50
    return config
