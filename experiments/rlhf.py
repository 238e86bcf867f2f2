"""Improve a policy by policy gradients: PPO, RLOO, REINFORCE or GRPO.

    python -m experiments.rlhf --config=configs/rlhf_tiny.py --workdir=runs/tiny_rlhf

A step samples responses to prompts, scores them by the rewards, and updates policy and value. It is
a function of parameters, seed and step alone: killed at any moment, it is done again the same.
"""

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from configs.schema import RlhfConfig
from experiments import entry
from experiments.assembly_rlhf import assemble_rlhf
from experiments.loading import Start, load_model, load_start
from experiments.rewards import load_rewards, load_value_start, weight_of
from experiments.run_flags import PROFILE, start_processes
from experiments.workdir_flag import WORKDIR
from llm.data.pipeline import data_digests, make_training_batches
from llm.data.prepare import prepare
from llm.data.tokenizers import Tokenizer
from llm.models.adapters import adapt_params
from llm.models.on_mesh import check_on_mesh
from llm.models.transformer import logical_axes, param_shapes
from llm.parallel.hosts import host_share, local_rows, place_batch
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings, ways
from llm.rl.collect import Collected, collect
from llm.rl.models import Models, own_part
from llm.rl.prompts import PromptBatches, load_prompts
from llm.rl.rewards import RewardFn
from llm.rl.rollout import check_gap, make_rollout
from llm.training.digests import tree_digest
from llm.training.replay import replayed
from llm.training.run import Run
from llm.training.run_config import check_config


def rlhf(
    config: RlhfConfig, workdir: str, *, watched: Mapping[str, RewardFn] | None = None
) -> None:
    """Improve, or go on improving, the policy that the config starts from.

    What is `watched` is logged as rewards are, and teaches nothing.
    """
    start = load_start(config.source, workdir)
    fields = dataclasses.asdict(config) | {"model": dataclasses.asdict(start.config)}
    check_config(workdir, fields, allow_change=config.run.allow_config_change)
    tokenizer = start.tokenizer

    # Mesh
    mesh = make_mesh(config.mesh)
    check_on_mesh(start.config, config.compute, mesh)

    # Prompts and rewards
    prompts = load_prompts(
        config.prompts,
        tokenizer,
        max_tokens=config.rollout.prompt_tokens,
        max_bad_rows=config.max_bad_rows,
    )
    batches = PromptBatches(prompts.prompts, config.rollout.prompts, config.seed)
    rewards, digests = load_rewards(config, config.compute)
    rewards |= {name: (function, 0.0) for name, function in (watched or {}).items()}
    ptx, ptx_digests = make_ptx_batches(config, tokenizer, mesh, workdir)
    digests |= ptx_digests | {"tokenizer": tokenizer.digest, "prompts": prompts.digest}

    # Models
    training = assemble_rlhf(config, start.config, mesh)
    models, learn = training.models, replayed(training.learn, config.run.replay_every_steps)
    width = prompts.width(8 * ways(mesh, "activation_length"))
    rollout_config = dataclasses.replace(config.rollout, prompt_tokens=width)
    rollout_fn = make_rollout(models.policy, rollout_config, tokenizer, mesh)

    # Run
    run = Run(
        workdir,
        fields,
        config.run,
        total_steps=config.total_steps,
        tokens_per_step=config.tokens_per_step,
        code=__file__,
    )
    with jax.set_mesh(mesh), run:
        # State
        params, frozen, source_digests = init_models(config, models, start, mesh)
        run.check_data(digests | source_digests)
        for line in (f"{len(prompts.prompts)} prompts", *prompts.left_out()):
            run.say(line)
        tokenizer.save(run.workdir / "tokenizer")
        state = training.init_state(
            mesh, config.seed, params=params, kl_coefficient=config.kl.coefficient
        )

        # Restore
        state, batches = run.restore(state, batches)
        if ptx:
            ptx.seek(run.step * config.ptx.batch_sequences)

        # Loop
        while run.step < run.total_steps:
            collected = collect(
                rollout_fn,
                rewards,
                batches,
                state,
                tokenizer,
                config.rollout,
                config.algorithm,
                mesh,
            )
            started = time.perf_counter()
            state, metrics = learn(
                state,
                frozen,
                collected.rollout,
                collected.scores,
                jnp.uint32(batches.cursor),
                next_ptx(ptx, mesh),
            )
            check_gap(float(metrics["rl/log_prob_gap"]), run.step + 1, config.rollout)
            seconds = collected.metrics | {"perf/learning_seconds": time.perf_counter() - started}
            if samples_are_due(config, run.step + 1):  # before a signal's save: they are lost after
                write_samples(run, collected, mesh, config.num_samples)
            state = run.after_step(state, metrics | seconds | speed(config, metrics, seconds))


def samples_are_due(config: RlhfConfig, step: int) -> bool:
    every = config.samples_every_steps
    return every > 0 and (step % every == 0 or step == config.total_steps)


def speed(config: RlhfConfig, metrics: Mapping, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return tokens that were generated and learnt from, without padding, a second of the step."""
    parts = sum(seconds[f"perf/{part}_seconds"] for part in ("generation", "scoring", "learning"))
    tokens = float(metrics["rl/response_tokens"]) * config.responses_per_step
    return {"perf/tokens_per_second": float(f"{tokens / parts:.4g}")}


def init_models(
    config: RlhfConfig, models: Models, start: Start, mesh: Mesh
) -> tuple[dict, dict, dict[str, str]]:
    """Return (parameters to train, frozen ones, digests of what is read at every start).

    A run that goes on gets zeros to restore into. A reference that does not share the policy's
    trunk is loaded from the source each time.
    """
    base, frozen, digests = start.params(), {}, {}
    if not models.shared:
        reference = load_model(config.source).params if base is None else base
        digests["source"] = tree_digest(reference)
        plain = models.reference
        placed = make_shardings(mesh, logical_axes(plain), param_shapes(plain))
        frozen["reference"] = jax.device_put(reference, placed)
    if base is None:
        shapes = models.spec().shapes
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), frozen, digests
    key, value_key = jax.random.split(jax.random.key(config.seed))
    params = {"policy": adapt_params(models.policy, base, key)}
    if models.value is not None:
        params["value"] = init_value(config, models, start, base, value_key)
    return params, frozen, digests


def init_value(config: RlhfConfig, models: Models, start: Start, base: dict, key) -> dict:
    """Return the value's parameters: the reward model's, or the policy's trunk under zeros."""
    if config.value_source:
        weight = weight_of(config.value_source, config)
        return load_value_start(config.value_source, models, start.tokenizer, weight=weight)
    trunk = {name: part for name, part in base.items() if name != "head"}
    head = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(models.value)["score"])
    value = adapt_params(models.value, {"trunk": trunk, "score": head}, key)
    return own_part(value) if models.shared else value


def make_ptx_batches(config: RlhfConfig, tokenizer: Tokenizer, mesh: Mesh, workdir: str):
    """Return batches of text whose loss is mixed in (PPO-ptx), or None, and the text's digests."""
    if not config.algorithm.ptx_weight:
        return None, {}
    prepared = prepare(config.ptx, tokenizer)
    batches = make_training_batches(
        config.ptx,
        prepared,
        tokenizer,
        share=host_share(mesh),
        state_dir=epath.Path(workdir) / "ptx",
    )
    digests = data_digests(config.ptx, prepared, tokenizer)
    return batches, {f"ptx {name}": digest for name, digest in digests.items()}


def next_ptx(ptx, mesh: Mesh) -> dict | None:
    if ptx is None:
        return None
    batch = next(ptx)
    return place_batch({name: x for name, x in batch.items() if name != "cursor"}, mesh)


def write_samples(run: Run, collected: Collected, mesh: Mesh, num_samples: int) -> None:
    """Write some responses of the step under way, with their scores, to the run's logs."""
    scores = local_rows(collected.scores, mesh)
    texts = {}
    for i in range(min(num_samples, len(collected.texts))):
        prompt, text = collected.prompts[i].text, collected.texts[i]
        texts[f"samples/{i}"] = f"{prompt}\n→ {text}\n(score {scores[i]:.3f})"
    run.write_texts(texts, ahead=True)


def main(config: RlhfConfig) -> None:
    start_processes(config)
    rlhf(entry.profiled(config, PROFILE.value), WORKDIR.value)


if __name__ == "__main__":
    entry.run(main, RlhfConfig)
