"""The programs of a step of policy gradients: sampling, reward models, learning."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import RlhfConfig
from experiments.assembly import PolicyTraining, assemble_rlhf
from experiments.loading import is_workdir, load_model_config
from experiments.plan_shapes import (
    KernelWork,
    Stage,
    StageProgram,
    device_bytes,
    frozen_models,
    kernel_work,
    reference_bytes,
    resident_bytes,
    updated_bytes,
)
from llm.generation.prompts import bucket_length
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_cache
from llm.parallel.hosts import check_batch
from llm.parallel.rules import batch_sharding, ways
from llm.rl.models import Models
from llm.rl.rollout import make_sample, repeats
from llm.rl.state import RlState
from llm.scaling.accounting import count_flops, num_params
from llm.scaling.work import grouped_flops
from llm.training.ahead import abstract_batch, placed


def plan_rlhf(config: RlhfConfig, shape: TransformerConfig, mesh: Mesh) -> Stage:
    training = assemble_rlhf(config, shape, mesh)
    models, state = training.models, training.abstract_state(mesh)
    frozen = frozen_models(models, mesh)
    rewards = _reward_models(config, shape)
    resident = resident_bytes(state) | reference_bytes(frozen)
    if rewards:
        resident["reward models"] = sum(4.0 * num_params(each) for each in rewards.values())
    everything, policy = sum(resident.values()), state.params["policy"]
    sampling = _sampled(config, models.policy, mesh)
    rollout = StageProgram(
        "rollout",
        lambda: sampling.lower(policy),
        moved=config.rollout.response_tokens * _read_a_token(config, shape, policy, mesh),
        kernels=_sampling_kernels(config, shape),
        beside=everything - device_bytes(policy),
        open_turns=config.rollout.response_tokens - 1,  # the first is the prefill's
    )
    responses = config.responses_per_step
    width = bucket_length(config.rollout.prompt_tokens + config.rollout.response_tokens)
    scores = [
        StageProgram(
            f"reward {name}",
            None,
            products=responses * width * count_flops(each, width).forward(head=False),
            beside=everything,
        )
        for name, each in rewards.items()
    ]
    learn = StageProgram(
        "learn",
        lambda: _lower_learn(config, training, state, frozen, sampling, mesh),
        kernels=_learning_kernels(config, shape, models),
        moved=config.algorithm.epochs
        * config.algorithm.minibatches
        * updated_bytes(state, training.rates),
        beside=resident.get("reward models", 0.0),
    )
    tokens = config.tokens_per_step
    return Stage(mesh, resident, [rollout, *scores, learn], tokens, config.total_steps)


class _Sampled(NamedTuple):
    """The sampling of a step's responses, in shapes."""

    sample: Any  # jitted, see make_sample
    prompts: jax.ShapeDtypeStruct
    lengths: jax.ShapeDtypeStruct
    key: Any
    each: int
    mesh: Mesh

    def lower(self, params: dict) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            arguments = params, self.prompts, self.lengths, self.key
            return self.sample.lower(*arguments, self.each)

    def rollout(self, params: dict) -> Any:
        """Return the shapes of what is sampled, cut by rows."""
        with jax.set_mesh(self.mesh):
            arguments = params, self.prompts, self.lengths, self.key
            found = jax.eval_shape(lambda *given: self.sample(*given, self.each), *arguments)
        return jax.tree.map(lambda x: placed(x, batch_sharding(self.mesh, x.shape)), found)


def _sampled(config: RlhfConfig, policy: Transformer, mesh: Mesh) -> _Sampled:
    # Of the tokenizer's ids none changes a shape.
    sample = make_sample(policy, config.rollout, eos_ids=(0,), pad_id=0)
    times, each = repeats(config.rollout, mesh, config.rollout.prompts)
    rows = config.rollout.prompts * times
    prompts = jax.ShapeDtypeStruct((rows, config.rollout.prompt_tokens), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    check_batch({"prompts": prompts, "lengths": lengths}, mesh)
    prompts, lengths = (placed(x, batch_sharding(mesh, x.shape)) for x in (prompts, lengths))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _Sampled(sample, prompts, lengths, key, each, mesh)


def _lower_learn(
    config: RlhfConfig,
    training: PolicyTraining,
    state: RlState,
    frozen: dict,
    sampling: _Sampled,
    mesh: Mesh,
) -> jax.stages.Lowered:
    rollout = sampling.rollout(state.params["policy"])
    ptx = None
    if config.algorithm.ptx_weight:
        ptx = abstract_batch(mesh, config.ptx.batch_sequences, config.ptx.length_tokens)
        del ptx["cursor"]
        check_batch(ptx, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    cursor = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated)
    scores = jax.ShapeDtypeStruct(rollout.lengths.shape, jnp.float32)
    scores = placed(scores, rollout.lengths.sharding)
    with jax.set_mesh(mesh):
        return training.learn.lower(state, frozen, rollout, scores, cursor, ptx)


def _read_a_token(config: RlhfConfig, shape: TransformerConfig, policy: dict, mesh: Mesh) -> float:
    """Return the least bytes that a device reads for a token of each of its responses: the policy,
    in the type that is computed in and whole but for tensor parallelism, and the cache."""
    itemsize = jnp.dtype(config.compute.dtype).itemsize
    weights = itemsize * sum(math.prod(x.shape) for x in jax.tree.leaves(policy))
    length = config.rollout.prompt_tokens + config.rollout.response_tokens
    cache = jax.eval_shape(
        lambda: init_cache(shape, config.responses_per_step, length, config.compute.dtype)
    )
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    parts = ways(mesh, "activation_batch") * ways(mesh, "activation_kv_heads")
    return weights / ways(mesh, "mlp") + kept / parts


def _sampling_kernels(config: RlhfConfig, shape: TransformerConfig) -> KernelWork:
    """Attention over a cache is no kernel's; experts are."""
    times, width = config.rollout.response_tokens - 1, config.rollout.prompt_tokens
    tokens = config.rollout.prompts * width + config.responses_per_step * times
    return KernelWork(0.0, tokens * grouped_flops(shape, config.compute, backward=False))


def _learning_kernels(config: RlhfConfig, shape: TransformerConfig, models: Models) -> KernelWork:
    """Looks at the responses, if they are not those of the only update; then the updates."""
    length = config.rollout.prompt_tokens + config.rollout.response_tokens
    tokens, learning = config.responses_per_step * length, 1 + (models.value is not None)
    updates = config.algorithm.epochs * config.algorithm.minibatches
    looks = 1 + learning * (updates > 1 or config.accumulate_steps > 1)
    looking = kernel_work(shape, config, length, looks * tokens, backward=False)
    passes = config.algorithm.epochs * learning
    learnt = kernel_work(shape, config, length, passes * tokens)
    return KernelWork(*map(sum, zip(looking, learnt, strict=True)))


def _reward_models(config: RlhfConfig, shape: TransformerConfig) -> dict[str, TransformerConfig]:
    """Return the shapes of the reward models; of one that is not there yet the policy's."""
    paths = {
        name: epath.Path(reward.path)
        for name, reward in sorted(config.rewards.items())
        if reward.kind == "model"
    }
    return {
        name: load_model_config(path) if is_workdir(path) else shape for name, path in paths.items()
    }
