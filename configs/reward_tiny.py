"""A reward model for newcomers and tests: is a film review as positive as it was asked to be?

    python -m experiments.reward --config=configs/reward_tiny.py --workdir=runs/tiny_reward

From the model of `finetune_tiny`, on the labels that critics gave their reviews.
"""

from configs.dataclass_config import to_config_dict
from configs.schema import RewardModelConfig
from llm.data.config import ComparisonsConfig, SourceConfig


def get_config(arg=None):
    config = to_config_dict(RewardModelConfig(source="runs/tiny_chat", total_epochs=4.0))
    config.comparisons = get_comparisons()
    config.optimizer.learning_rate = 1e-3
    config.dropout_rate = 0.1
    config.evaluate_every_steps = 50
    config.run.save_every_steps = 100
    return config


def get_comparisons():
    """Return the feedback on reviews as comparisons."""
    source = SourceConfig(
        kind="tfds",
        name="film_reviews/feedback",
        format="feedback",
        validation_split="validation",
    )
    return to_config_dict(
        ComparisonsConfig(source=source, length_tokens=128, batch_prompts=16, max_responses=4)
    )
