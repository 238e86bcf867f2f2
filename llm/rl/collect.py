"""One step's responses: sampled, put into words, scored; drawn again where asked. Third floor."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llm.data.tokenizers import Tokenizer
from llm.parallel.hosts import host_share, local_rows, place_batch
from llm.rl.advantages import response_penalties
from llm.rl.config import AlgorithmConfig, RolloutConfig
from llm.rl.prompts import Prompt
from llm.rl.rewards import RewardFn, score
from llm.rl.rollout import Rollout, RolloutFn, response_texts
from llm.training.state import TrainState


class Collected(NamedTuple):
    """Responses with their scores; texts and prompts are this host's."""

    rollout: Rollout
    scores: Float[Array, " B"]  # rewards by their weights, less the penalties
    prompts: list[Prompt]
    texts: list[str]
    metrics: dict[str, float]  # rewards by source, seconds by part


def collect(
    rollout_fn: RolloutFn,
    rewards: Mapping[str, tuple[RewardFn, float]],
    batches: Iterator[list[Prompt]],
    state: TrainState,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    algorithm: AlgorithmConfig,
    mesh: Mesh,
) -> Collected:
    """Return the step's responses: a function of prompts, parameters, seed and step alone.

    With `dynamic_draws`, further prompts are drawn, so many times at most, while some groups have
    equal scores; groups whose scores differ take the places of those.
    """
    settings = tokenizer, config, algorithm, mesh
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    key = jax.random.fold_in(key, 0)  # 1 is the learning's
    kept = _draw(rollout_fn, rewards, batches, state, *settings, jax.random.fold_in(key, 0))
    for draw in range(1, (algorithm.dynamic_draws or 0) + 1):
        if _everywhere(bool(_informative(kept, config.group).all())):
            break
        again = jax.random.fold_in(key, draw)
        more = _draw(rollout_fn, rewards, batches, state, *settings, again)
        kept = _fill(kept, more, config.group, mesh)
    scores = place_batch({"scores": kept.scores}, mesh)["scores"]
    return kept._replace(scores=scores)


def _draw(
    rollout_fn, rewards, batches, state, tokenizer, config, algorithm, mesh, key
) -> Collected:
    """Sample and score one batch of prompts; scores stay on the host."""
    started = time.perf_counter()
    mine = host_share(mesh).of(next(batches))
    rollout = jax.block_until_ready(rollout_fn(state.params["policy"], mine, key))
    sampled = time.perf_counter()
    prompts = [prompt for prompt in mine for _ in range(config.group)]
    texts = response_texts(rollout, tokenizer, mesh)
    scores, by_source = score(rewards, prompts, texts)
    scores -= _penalties(rollout, algorithm, mesh)
    seconds = {
        "perf/generation_seconds": sampled - started,
        "perf/scoring_seconds": time.perf_counter() - sampled,
    }
    means = _means_everywhere({f"rl/reward/{name}": x for name, x in by_source.items()})
    return Collected(rollout, scores, prompts, texts, means | seconds)


def _penalties(rollout: Rollout, algorithm: AlgorithmConfig, mesh: Mesh) -> np.ndarray:
    """Return what this host's responses lose. Here, where groups are judged, and nowhere else."""
    penalties = response_penalties(
        *(jnp.asarray(local_rows(x, mesh)) for x in (rollout.lengths, rollout.finished)),
        max_length_tokens=rollout.mask.shape[1],
        missing_eos=algorithm.missing_eos_penalty,
        overlong_buffer_tokens=algorithm.overlong_buffer_tokens,
    )
    return np.asarray(penalties, np.float32)


def _informative(collected: Collected, group: int) -> np.ndarray:
    grouped = collected.scores.reshape(-1, group)
    return (grouped != grouped[:, :1]).any(axis=1)


def _fill(kept: Collected, more: Collected, group: int, mesh: Mesh) -> Collected:
    """Return `kept` with groups of equal scores replaced by groups of `more` whose scores differ.

    Metrics are of the first draw, so that rewards are those of prompts as they come; seconds add.
    """
    empty = np.flatnonzero(~_informative(kept, group))
    found = np.flatnonzero(_informative(more, group))[: len(empty)]
    source = np.arange(len(kept.scores)).reshape(-1, group)
    source[empty[: len(found)]] = len(kept.scores) + found[:, None] * group + np.arange(group)
    rows = source.reshape(-1)

    def pick(a: Sequence, b: Sequence) -> list:
        both = [*a, *b]
        return [both[row] for row in rows]

    arrays = {
        name: np.concatenate([local_rows(a, mesh), local_rows(b, mesh)])[rows]
        for name, a, b in zip(Rollout._fields, kept.rollout, more.rollout, strict=True)
    }
    seconds = {
        name: value + (more.metrics[name] if name.startswith("perf/") else 0.0)
        for name, value in kept.metrics.items()
    }
    return Collected(
        Rollout(**place_batch(arrays, mesh)),
        np.concatenate([kept.scores, more.scores])[rows],
        pick(kept.prompts, more.prompts),
        pick(kept.texts, more.texts),
        seconds,
    )


def _means_everywhere(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the means over all hosts, whose shares are equal."""
    means = [float(np.mean(x)) for x in scores.values()]
    if jax.process_count() > 1:
        means = multihost_utils.process_allgather(np.float32(means)).mean(axis=0).tolist()
    return dict(zip(scores, means, strict=True))


def _everywhere(here: bool) -> bool:
    """Whether it is so on every host."""
    if jax.process_count() == 1:
        return bool(here)
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())
