"""The programs of a step of policy gradients: sampling, reward models, learning."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import RlhfConfig
from experiments.assembly_rlhf import PolicyTraining, assemble_rlhf
from experiments.loading import is_workdir, load_model_config
from experiments.plan_shapes import (
    Passes,
    Stage,
    StageProgram,
    device_bytes,
    frozen_models,
    kernel_flops,
    num_score_params,
    reference_bytes,
    resident_bytes,
    updated_bytes,
)
from llm.generation.prompts import bucket_length
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_cache
from llm.parallel.hosts import check_batch
from llm.parallel.rules import batch_sharding, ways
from llm.rl.reward_model import own_parts
from llm.rl.rollout import make_sample, repeats
from llm.rl.state import RlState, init_controllers, with_controllers
from llm.scaling.accounting import count_flops, num_params
from llm.scaling.work import grouped_flops
from llm.training.ahead import abstract_batch, abstract_state, placed


def plan_rlhf(config: RlhfConfig, shape: TransformerConfig, mesh: Mesh) -> Stage:
    """Return the programs of a step whose prompts and responses are as long as they may be."""
    training = assemble_rlhf(config, shape, mesh)
    models, state = training.models, state_of_rlhf(training, mesh)
    frozen = frozen_models(models, mesh)
    rewards, notes = _reward_models(config, shape)
    resident = resident_bytes(state) | reference_bytes(frozen)
    if rewards:
        own = _devices_of_a_process(mesh)
        resident["reward models"] = sum(
            4.0 * num_score_params(each) / own_parts(each.width, own) for each in rewards.values()
        )
    everything, policy = sum(resident.values()), state.params["policy"]
    sampling = _sampled(config, models.policy, mesh)
    rollout = StageProgram(
        "rollout",
        lambda: sampling.lower(policy),
        kernels=_sampling_kernels(config, training, sampling),
        moved=config.rollout.response_tokens * _read_a_token(config, shape, policy, mesh),
        beside=everything - device_bytes(policy),
        open_turns=config.rollout.response_tokens - 1,  # the first is the prefill's
    )
    scores = [
        StageProgram(
            f"reward {name}",
            None,
            products=_scoring_flops(config, each, config.rewards[name].batch_responses),
            beside=everything,
        )
        for name, each in rewards.items()
    ]
    updates = config.algorithm.epochs * config.algorithm.minibatches
    learn = StageProgram(
        "learn",
        lambda: _lower_learn(config, training, state, frozen, sampling, mesh),
        kernels=_learning_kernels(config, training),
        moved=updates * updated_bytes(state, training.rates),
        beside=resident.get("reward models", 0.0),
    )
    programs, tokens = [rollout, *scores, learn], config.tokens_per_step
    return Stage(
        mesh, num_params(shape), resident, programs, tokens, config.total_steps, tuple(notes)
    )


def state_of_rlhf(training: PolicyTraining, mesh: Mesh) -> RlState:
    """Return the shapes of a run's state and where they lie."""
    train = abstract_state(training.spec, training.optimizer, mesh, rates=training.rates)
    state = with_controllers(train, jax.eval_shape(functools.partial(init_controllers, 0.0)))
    return jax.tree.map(placed, state, training.shardings)


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
    """Return the bytes that a device reads for a token of each of its responses: its part, by
    tensor and expert, of what multiplies them, in the smaller of the types that it is kept and
    computed in; and the cache."""
    widest = jnp.dtype(config.compute.dtype).itemsize

    def one(path, x):
        if path[-1].key == "embedding" and not (shape.tied_head and path[0].key == "embedder"):
            return 0.0  # a row is looked up
        cuts = {axis for axes in x.sharding.spec if axes for axis in np.ravel(axes)}
        parts = math.prod(mesh.shape[axis] for axis in cuts & {"tensor", "expert"})
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        itemsize = min(widest, x.dtype.itemsize) if floating else jnp.iinfo(x.dtype).bits / 8
        return math.prod(x.shape) * itemsize / parts

    weights = sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(one, policy)))
    length = config.rollout.prompt_tokens + config.rollout.response_tokens
    cache = jax.eval_shape(
        lambda: init_cache(shape, config.responses_per_step, length, config.compute.dtype)
    )
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    return weights + kept / ways(mesh, "activation_batch") / ways(mesh, "activation_kv_heads")


def _sampling_kernels(config: RlhfConfig, training: PolicyTraining, sampling: _Sampled) -> float:
    """Prompts are read as rows are; attention of one token to a cache is no kernel's."""
    shape, width = training.models.policy.config, config.rollout.prompt_tokens
    read = Passes(math.prod(sampling.prompts.shape), width, backward=False)
    flops = kernel_flops(shape, config.compute, None, read)
    if shape.moe_layers:
        tokens = config.responses_per_step * (config.rollout.response_tokens - 1)
        flops += tokens * grouped_flops(shape, config.compute, backward=False)
    return flops


def _learning_kernels(config: RlhfConfig, training: PolicyTraining) -> float:
    """Looks at the responses, if they are not those of the only update; then the updates, and those
    of text."""
    algorithm, models = config.algorithm, training.models
    length = config.rollout.prompt_tokens + config.rollout.response_tokens
    tokens, learning = config.responses_per_step * length, 1 + (models.value is not None)
    once = algorithm.epochs * algorithm.minibatches == config.accumulate_steps == 1
    looks = 1 + learning * (not once)
    passes = [
        Passes(looks * tokens, length, backward=False),
        Passes(algorithm.epochs * learning * tokens, length),
    ]
    if algorithm.ptx_weight:
        text = config.ptx.batch_sequences * config.ptx.length_tokens
        passes.append(Passes(algorithm.epochs * text, config.ptx.length_tokens))
    return kernel_flops(models.policy.config, config.compute, training.rates["policy"], *passes)


def _scoring_flops(config: RlhfConfig, shape: TransformerConfig, batch_responses: int) -> float:
    """Return the FLOPs of a reward model's forward pass over the responses, padded as they are."""
    width = bucket_length(config.rollout.prompt_tokens + config.rollout.response_tokens)
    width = min(width, shape.max_length_tokens)
    rows = -(-config.responses_per_step // batch_responses) * batch_responses
    return rows * width * count_flops(shape, width).forward(head=False)


def _devices_of_a_process(mesh: Mesh) -> int:
    devices = list(mesh.devices.flat)
    return sum(device.process_index == devices[0].process_index for device in devices)


def _reward_models(
    config: RlhfConfig, policy: TransformerConfig
) -> tuple[dict[str, TransformerConfig], list[str]]:
    """Return the shapes of the reward models, and which of them are taken to be the policy's."""
    shapes, notes = {}, []
    for name, reward in sorted(config.rewards.items()):
        if reward.kind == "model" and is_workdir(epath.Path(reward.path)):
            shapes[name] = load_model_config(reward.path)
        elif reward.kind == "model":
            shapes[name] = policy
            notes.append(f"rewards.{name}: {reward.path} is not there; taken to be like the policy")
    return shapes, notes
