"""A training loop in miniature, for tests of Run: momentum SGD on noise, data from a counter.
Also a script (workdir, steps, …), for the tests that must kill a process."""

import argparse
import functools
import os
import signal
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm.training import manifests
from llm.training.run import Run
from llm.training.run_config import RunConfig


@flax.struct.dataclass
class ToyState:
    step: jax.Array
    params: dict
    opt_state: tuple
    ema_params: dict | None
    rng: jax.Array
    cursor: jax.Array
    skipped_in_a_row: jax.Array


class ToyBatches:
    """Batches that are a pure function of the cursor."""

    def __init__(self):
        self.cursor = 0

    def seek(self, cursor: int) -> None:
        self.cursor = cursor

    def __next__(self):
        self.cursor += 4
        x = np.sin(np.arange(self.cursor - 4, self.cursor, dtype=np.float32))
        return {"x": x, "cursor": np.uint32(self.cursor)}


def toy_state(width: int = 16) -> ToyState:
    params = {
        "kernel": jax.random.normal(jax.random.key(1), (width, 24)),
        "layers": {"scale": jnp.ones((3, 8), jnp.bfloat16)},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    return ToyState(
        step=jnp.int32(0),
        params=params,
        opt_state=(zeros, None, {"count": jnp.int32(0)}),
        ema_params=jax.tree.map(jnp.copy, params),
        rng=jax.random.key_data(jax.random.key(7)),
        cursor=jnp.uint32(0),
        skipped_in_a_row=jnp.int32(0),
    )


@functools.partial(jax.jit, donate_argnums=0)
def toy_step(state: ToyState, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    momentum, none, count = state.opt_state

    def move(p, m):
        noise = jax.random.normal(key, p.shape, jnp.float32)
        m = 0.9 * m + (0.1 * p + noise * batch["x"].mean()).astype(m.dtype)
        return (p - 0.1 * m).astype(p.dtype), m

    moved = jax.tree.map(move, state.params, momentum)
    params, momentum = jax.tree.transpose(
        jax.tree.structure(state.params), jax.tree.structure((0, 0)), moved
    )
    ema = jax.tree.map(lambda e, p: (0.9 * e + 0.1 * p).astype(e.dtype), state.ema_params, params)
    bad = ~jnp.isfinite(batch["x"].sum())
    skipped = jnp.where(bad, state.skipped_in_a_row + 1, 0)
    new = ToyState(
        state.step + 1,
        params,
        (momentum, none, {"count": count["count"] + 1}),
        ema,
        state.rng,
        batch["cursor"],
        skipped,
    )
    return new, {"train/loss": jnp.mean(params["kernel"]), "train/skipped_in_a_row": skipped}


def run_toy(
    workdir, total_steps: int, *, stop_after: int | None = None, evaluate_every: int = 5, **options
):
    """Train to total_steps (or leave the loop after stop_after); return state and run."""
    options = {"log_every_steps": 1, "save_every_steps": 2} | options
    run = Run(
        workdir, {"seed": 0}, RunConfig(**options), total_steps=total_steps, tokens_per_step=32
    )

    def evaluate_if_due(state):
        if run.due(evaluate_every):
            run.write_metrics({"eval/sum": jnp.sum(state.params["kernel"])})
            run.write_texts({"sample": f"text of step {run.step}"})

    with run:
        state, batches = run.restore(toy_state(), ToyBatches())
        evaluate_if_due(state)
        while run.step < (stop_after or run.total_steps):
            state, metrics = toy_step(state, next(batches))
            state = run.after_step(state, metrics)
            evaluate_if_due(state)
    return state, run


def _die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--total_steps", type=int, default=10**6)
    parser.add_argument("--save_every_steps", type=int, default=2)
    parser.add_argument("--die_at", default="")  # a function of manifests, and a step: "f:4"
    args = parser.parse_args()
    if args.die_at:
        name, step = args.die_at.split(":")
        original = getattr(manifests, name)

        def dying(step_dir, *rest, **kwargs):
            if step_dir.name == step:
                _die()
            return original(step_dir, *rest, **kwargs)

        setattr(manifests, name, dying)
    run_toy(args.workdir, args.total_steps, save_every_steps=args.save_every_steps)
