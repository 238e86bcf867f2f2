"""Policy gradients that newcomers and tests run, from the model of `finetune_tiny`.

    python -m experiments.rlhf --config=configs/rlhf_tiny.py --workdir=runs/tiny_rlhf

The reward is a rule, that a review has the word film or movie. A reward model takes its place with
`--config.rewards.rule="{'kind': 'model', 'path': 'runs/tiny_reward'}"`.
"""

from configs.dataclass_config import to_config_dict
from configs.schema import RlhfConfig
from llm.data.config import SourceConfig
from llm.rl.config import RewardConfig


def get_config(arg=None):
    rule = RewardConfig(kind="pattern", path=r".*\b(film|movie)\b.*")
    config = to_config_dict(RlhfConfig(source="runs/tiny_chat", rewards={"rule": rule}))
    config.prompts = to_config_dict(
        SourceConfig(
            kind="tfds",
            name="film_reviews/instructions",
            format="prompt_response",
            group_field="film",
            validation_split="validation",
        )
    )
    config.rollout.prompts = 32
    config.rollout.prompt_tokens = 32
    config.rollout.response_tokens = 40
    config.algorithm.epochs = 2
    config.algorithm.minibatches = 2
    config.algorithm.whiten_advantages = True
    config.optimizer.learning_rate = 3e-4
    config.kl.coefficient = 0.02
    config.total_steps = 60
    config.run.log_every_steps = 5
    config.run.save_every_steps = 20
    return config
