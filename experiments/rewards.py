"""The rewards of a config, and what a value starts from: reward models loaded, digests recorded."""

import dataclasses
from typing import NamedTuple

from etils import epath

from configs.schema import RlhfConfig
from experiments.loading import is_workdir, load_model_config, load_section
from llm.data.disk import read_json_object
from llm.data.tokenizer_files import load_tokenizer
from llm.data.tokenizers import Tokenizer
from llm.models.adapters import merge_params
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel
from llm.rl.config import RewardConfig
from llm.rl.models import Models, own_part
from llm.rl.reward_model import make_model_reward
from llm.rl.rewards import RewardFn, make_verifier, source_digest
from llm.training.loading import load_params

SCALE = "scale.json"  # in a reward model's workdir: shift and scale of its scores


class LoadedReward(NamedTuple):
    """A reward model on the host; its score is (raw − shift) / scale."""

    config: TransformerConfig
    adapter: AdapterConfig
    params: dict  # trunk and score, with the adapter as it was trained
    tokenizer: Tokenizer
    shift: float
    scale: float
    digest: str

    @property
    def merged(self) -> dict:
        """The parameters of the same model without its adapter."""
        if self.adapter == AdapterConfig():
            return self.params
        return merge_params(ScalarModel(self.config, adapter=self.adapter), self.params)


def load_reward(workdir: str) -> LoadedReward:
    """Return the reward model of a workdir of experiments.reward, verified.

    Raises:
      ValueError: the workdir is not one of a reward model.
    """
    path = epath.Path(workdir)
    if not is_workdir(path) or not (path / SCALE).exists():
        raise ValueError(f"{workdir} is not the workdir of a finished reward model: no {SCALE}")
    loaded, scale = load_params(path), read_json_object(path / SCALE)
    if not all(type(scale.get(name)) in (int, float) for name in ("shift", "scale")):
        raise ValueError(f"{path / SCALE} does not tell the numbers shift and scale")
    return LoadedReward(
        config=load_model_config(path),
        adapter=load_section(path, "adapter", AdapterConfig, default=AdapterConfig()),
        params=loaded.params,
        tokenizer=load_tokenizer(path / "tokenizer"),
        shift=scale["shift"],
        scale=scale["scale"],
        digest=loaded.digest,
    )


def load_rewards(
    config: RlhfConfig, compute: ComputeConfig
) -> tuple[dict[str, tuple[RewardFn, float]], dict[str, str]]:
    """Return the config's rewards with their weights by name, and the digests of their models."""
    rewards, digests = {}, {}
    for name, reward in sorted(config.rewards.items()):
        if reward.kind == "model":
            function, digests[f"rewards.{name}"] = _model_reward(
                reward, compute, config.rollout.prompt_tokens + config.rollout.response_tokens
            )
        else:
            function = make_verifier(reward)
            if reward.kind == "python":
                digests[f"rewards.{name}"] = source_digest(reward.path)
        rewards[name] = (function, reward.weight)
    return rewards, digests


def load_value_start(
    workdir: str, models: Models, tokenizer: Tokenizer, *, weight: float = 1.0
) -> dict:
    """Return the parameters of a value that starts as a reward model of that weight.

    Its head gives what the run is paid, weight · (raw − shift) / scale. On a shared trunk these are
    the reward model's factors, whose trunk must be the policy's.

    Raises:
      ValueError: it is of another shape, or reads other tokens than the policy.
    """
    loaded, instead = load_reward(workdir), "or start it from the policy (value_source empty)"
    if loaded.tokenizer.definition != tokenizer.definition:
        raise ValueError(
            f"value_source={workdir} has another tokenizer than the policy, whose tokens the value "
            f"must read; give another, {instead}"
        )
    if dataclasses.replace(loaded.config, dropout_rate=0.0) != models.value.config:
        raise ValueError(
            f"value_source={workdir} has another shape than the policy; give another, {instead}"
        )
    if not models.shared:
        return _as_paid(loaded.merged, loaded, weight)
    if loaded.adapter != models.value.adapter:
        raise ValueError(
            f"value_source={workdir} was trained with {loaded.adapter}; on the policy's trunk it "
            f"needs the same adapter, {models.value.adapter}; {instead}"
        )
    return _as_paid(own_part(loaded.params), loaded, weight)


def _as_paid(params: dict, loaded: LoadedReward, weight: float) -> dict:
    """Return a score's parameters with shift, scale and weight folded into its head."""
    head, factor = params["score"], weight / loaded.scale
    bias = (head["bias"] - loaded.shift) * factor
    return {**params, "score": {**head, "kernel": head["kernel"] * factor, "bias": bias}}


def weight_of(workdir: str, config: RlhfConfig) -> float:
    """Return what a reward model weighs among the config's rewards; 1 if it is none of them."""
    weights = [
        reward.weight
        for reward in config.rewards.values()
        if reward.kind == "model" and epath.Path(reward.path) == epath.Path(workdir)
    ]
    return sum(weights) if weights else 1.0


def _model_reward(
    reward: RewardConfig, compute: ComputeConfig, usual_tokens: int
) -> tuple[RewardFn, str]:
    loaded = load_reward(reward.path)
    function = make_model_reward(
        ScalarModel(loaded.config, compute),
        loaded.merged,
        loaded.tokenizer,
        shift=loaded.shift,
        scale=loaded.scale,
        batch_responses=reward.batch_responses,
        usual_tokens=usual_tokens,
    )
    return function, loaded.digest
