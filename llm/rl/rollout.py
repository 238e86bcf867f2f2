"""Responses to prompts by the policy that learns, in fixed shapes. Third floor."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llm.data.tokenizers import Tokenizer
from llm.generation.config import SamplingConfig
from llm.generation.decode import make_generate
from llm.generation.generator import stop_ids
from llm.generation.prompts import sequence_keys
from llm.models.transformer import Transformer
from llm.parallel.hosts import host_share, local_rows, place_batch
from llm.parallel.rules import ways
from llm.rl.config import RolloutConfig
from llm.rl.prompts import Prompt


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
class Rollout(NamedTuple):
    """B responses: P tokens of prompt, padded on the left, then M of response, on the right."""

    tokens: Int[Array, "B P+M"]
    segment_ids: Int[Array, "B P+M"]  # 0: padding
    positions: Int[Array, "B P+M"]
    mask: Float[Array, "B M"]  # 1 on tokens of the response, EOS included
    sampler_log_probs: Float[Array, "B M"]  # nats, of softmax(logits / temperature)
    lengths: Int[Array, " B"]  # of responses
    finished: Bool[Array, " B"]  # ended by EOS


RolloutFn = Callable[..., Rollout]


class SamplerMismatchError(RuntimeError):
    """Trainer and sampler disagree on how likely the responses are."""


def check_gap(gap: float, step: int, config: RolloutConfig) -> None:
    """Raise a SamplerMismatchError if the log-probability gap, in nats a token, is too wide."""
    if not gap <= config.max_log_prob_gap:  # NaN, too
        raise SamplerMismatchError(
            f"step {step}: log-probabilities of trainer and sampler differ by {gap:.3g} nats a "
            f"token, more than rollout.max_log_prob_gap={config.max_log_prob_gap}: what is learnt "
            "would not be the policy that was sampled. Compute in float32, or widen the bound"
        )


def make_rollout(
    model: Transformer, config: RolloutConfig, tokenizer: Tokenizer, mesh: Mesh
) -> RolloutFn:
    """Return (params, prompts, key) → Rollout of this host's prompts among all hosts'.

    Each prompt is answered `config.group` times, side by side. Compiles once: shapes are the
    config's.
    """
    pad_id = tokenizer.eos_id
    sample = make_sample(model, config, eos_ids=stop_ids(tokenizer), pad_id=pad_id)

    def rollout(params: dict, prompts: Sequence[Prompt], key) -> Rollout:
        times, each = repeats(config, mesh, len(prompts) * host_share(mesh).count)
        prompts = [prompt for prompt in prompts for _ in range(times)]
        rows = np.full((len(prompts), config.prompt_tokens), pad_id, np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            row[-len(prompt.tokens) :] = prompt.tokens
        lengths = np.array([len(prompt.tokens) for prompt in prompts], np.int32)
        placed = place_batch({"prompts": rows, "lengths": lengths}, mesh)
        return sample(params, placed["prompts"], placed["lengths"], key, each)

    return rollout


def make_sample(
    model: Transformer, config: RolloutConfig, *, eos_ids: Sequence[int], pad_id: int
) -> Callable[..., Rollout]:
    """Return the jitted (params, prompts [B P], lengths [B], key, n) → Rollout of n each."""
    sampling = SamplingConfig(max_new_tokens=config.response_tokens, temperature=config.temperature)
    generate = make_generate(model, sampling, eos_ids=eos_ids, pad_id=pad_id)

    @functools.partial(jax.jit, static_argnums=4)
    def sample(params, prompts, lengths, key, each) -> Rollout:
        out = generate(params, prompts, lengths, sequence_keys(key, prompts.shape[0] * each))
        prompts, lengths = (jnp.repeat(x, each, axis=0) for x in (prompts, lengths))
        width, length = prompts.shape[1], config.response_tokens
        mask = jnp.arange(length) < out.lengths[:, None]
        tokens = jnp.concatenate([prompts, out.tokens], axis=1)
        index = jnp.arange(width + length)
        first = width - lengths[:, None]
        real = jnp.concatenate([index[:width] >= first, mask], axis=1)
        return Rollout(
            tokens=tokens,
            segment_ids=real.astype(jnp.int32),
            positions=jnp.maximum(index - first, 0),
            mask=mask.astype(jnp.float32),
            sampler_log_probs=jnp.where(mask, out.log_probs, 0.0),
            lengths=out.lengths,
            finished=out.finished,
        )

    return sample


def repeats(config: RolloutConfig, mesh: Mesh, num_prompts: int) -> tuple[int, int]:
    """Return how often a prompt of so many is read, and how often each time it is answered.

    It is read once for its whole group, unless there are too few to go round.
    """
    return (1, config.group) if divides_prompts(mesh, num_prompts) else (config.group, 1)


def divides_prompts(mesh: Mesh, num_prompts: int) -> bool:
    """Return whether so many prompts, of all hosts, divide over the devices of the mesh."""
    return num_prompts % ways(mesh, "activation_batch") == 0


def response_texts(rollout: Rollout, tokenizer: Tokenizer, mesh: Mesh) -> list[str]:
    """Return this host's responses as text, without control tokens, up to where they ended."""
    tokens, lengths = (local_rows(x, mesh) for x in (rollout.tokens, rollout.lengths))
    responses = tokens[:, tokens.shape[1] - rollout.mask.shape[1] :]
    return [
        tokenizer.decode(row[:length], skip_control=True)
        for row, length in zip(responses.tolist(), lengths.tolist(), strict=True)
    ]
