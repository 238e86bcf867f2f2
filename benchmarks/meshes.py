"""Do all meshes train alike? Five steps of each stage on eight devices against one, in float64.

    python -m benchmarks.meshes
    python -m benchmarks.meshes --stages=ppo --mesh=pipeline

The devices are eight of the CPU's. Compared are the loss of each step, the gradient of the first
(the optimizer's first moment after it) and the parameters after the last: the largest difference
of any array over that array's largest number. Dropout is off: its masks depend on where they are
drawn.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Model, Transformer, init_params
from llm.parallel.config import MESH_AXES, MeshConfig
from llm.parallel.hosts import place_batch
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings
from llm.rl.config import AlgorithmConfig, KLConfig, RolloutConfig
from llm.rl.learning import make_learn_step
from llm.rl.models import Models
from llm.rl.rollout import Rollout
from llm.rl.state import init_controllers, rl_shardings, with_controllers
from llm.training.config import OptimizerConfig, ScheduleConfig, TrainableConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.preference_loss import make_reward_loss
from llm.training.schedules import make_schedule
from llm.training.state import init_state, param_spec, state_shardings
from llm.training.step import make_train_step
from llm.training.trainable import make_rates, split

_STAGES = flags.DEFINE_list("stages", ["pretrain", "sft", "reward", "ppo"], "Which stages.")
_ONLY = flags.DEFINE_string("mesh", "", "Only meshes whose name this is found in.")


NUM_STEPS = 5
B, T = 32, 16
MODEL = TransformerConfig(
    vocab_size=250,
    width=16,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_width=32,
    max_length_tokens=T,
    qk_norm=True,
)
# No clipping, so that the first moment is the gradient times 1 − beta1.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, clip_norm=None)
SCHEDULE = make_schedule(ScheduleConfig("constant"), total_steps=NUM_STEPS, tokens_per_step=B * T)
PPO = AlgorithmConfig(name="ppo")
ROLLOUT = RolloutConfig(prompts=B // 2, group=2, prompt_tokens=T // 2, response_tokens=T // 2)


class Case(NamedTuple):
    """A mesh, and how its model computes."""

    mesh: MeshConfig
    compute: dict[str, Any] = {}
    model: dict[str, Any] = {}

    @property
    def name(self) -> str:
        sizes = {axis: getattr(self.mesh, axis) for axis in MESH_AXES}
        parts = [f"{axis} {size}" for axis, size in sizes.items() if size != 1]
        model = self.model
        if "num_experts" in model:
            form = "capacity" if "expert_capacity_factor" in model else "dropless"
            model = {"experts": form}
        shown = (f"{key}={value}" for key, value in (self.compute | model).items())
        return ", ".join([" × ".join(parts), *shown])


def one(**sizes: int) -> MeshConfig:
    """Return a mesh of these axes, the others being 1."""
    return MeshConfig(**({"data": 1} | sizes))


DROPLESS = dict(
    cycle_layers=("global_moe",), num_experts=4, experts_per_token=2, expert_mlp_width=16
)
WITH_CAPACITY = DROPLESS | dict(expert_capacity_factor=1.25)
CASES = (
    Case(one(data=8)),
    Case(one(fsdp=8)),
    Case(one(tensor=4, data=2)),
    Case(one(context=8)),
    Case(one(pipeline=4, data=2)),
    Case(one(data=2, fsdp=2, tensor=2), {"remat": "full"}),
    Case(one(fsdp=4, context=2)),
    Case(one(fsdp=2, tensor=2, context=2), {"remat": "attention"}),
    Case(one(context=4, tensor=2), model={"num_kv_heads": 2}),
    Case(one(pipeline=2, fsdp=4), {"pipeline_repeats": 2, "pipeline_microbatches": 2}),
    Case(one(pipeline=2, fsdp=2, tensor=2), {"remat": "dots", "unroll_layers": False}),
    Case(one(pipeline=2, context=2, tensor=2), {"pipeline_repeats": 2}),
    Case(one(pipeline=2, data=2, context=2), model={"sliding_window_tokens": 5,
                                                    "cycle_layers": ("local", "global")}),
    Case(one(expert=4, fsdp=2), model=DROPLESS),
    Case(one(expert=2, context=2, tensor=2), model=DROPLESS),
    Case(one(pipeline=2, expert=2, fsdp=2), {"pipeline_repeats": 2}, DROPLESS),
    Case(one(expert=4, data=2), model=WITH_CAPACITY),
    Case(one(pipeline=2, expert=2, tensor=2), model=WITH_CAPACITY),
)  # fmt: skip


class Outcome(NamedTuple):
    """What is compared."""

    losses: list[float]
    gradient: Any
    params: Any


class Problem(NamedTuple):
    """A stage on a mesh: where it begins, and (state, number of the step) → (state, metrics)."""

    state: Any
    step: Callable[[Any, int], tuple[Any, dict]]


def run_stage(stage: str, case: Case) -> Outcome:
    """Train one stage on a case's mesh; needs 64-bit types to be on."""
    config = dataclasses.replace(MODEL, **case.model)
    compute = ComputeConfig(dtype="float64", **case.compute)
    num_devices = math.prod(getattr(case.mesh, axis) for axis in MESH_AXES)
    mesh = make_mesh(case.mesh, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        problem = STAGES[stage](config, compute, mesh)
        state, losses, gradient = problem.state, [], None
        for number in range(NUM_STEPS):
            state, metrics = problem.step(state, number)
            losses.append(float(metrics["train/loss"]))
            if gradient is None:
                gradient = jax.device_get(_first_moment(stage, state.opt_state))
        return Outcome(losses, gradient, jax.device_get(_compared(stage, state.params)))


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of any array over the largest number of that array."""

    def of(a, b):
        return float(np.max(np.abs(np.subtract(a, b))) / max(np.max(np.abs(b)), 1e-300))

    return max(jax.tree.leaves(jax.tree.map(of, ours, theirs)))


def _compared(stage: str, tree: Any) -> list:
    """Return a tree's arrays, but for the bias of a reward head: since only differences of rewards
    count its gradient is 0, and Adam makes steps of what is left of it, which is rounding."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    none = lambda path, x: stage == "reward" and x.shape == (1,) and path[-1].key == "bias"  # noqa: E731
    return [x for path, x in leaves if not none(path, x)]


def _first_moment(stage: str, opt_state) -> list:
    paths = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    return [x for _, state in paths if hasattr(state, "mu") for x in _compared(stage, state.mu)]


def _pretrain(config, compute, mesh, adapter=None, kept: float = 1.0) -> Problem:
    model = Transformer(config, compute, adapter or AdapterConfig())
    routers = dict(router_balance_weight=1e-2, router_z_weight=1e-3)
    loss_fn = make_causal_lm_loss(model, z_loss=1e-3, tile_tokens=64, **routers)
    return _supervised(model, loss_fn, mesh, lambda random: _packed_rows(random, kept))


def _sft(config, compute, mesh) -> Problem:
    """Answers alone are learnt, by low-rank factors."""
    return _pretrain(config, compute, mesh, AdapterConfig(rank=2), kept=0.3)


def _reward(config, compute, mesh) -> Problem:
    model = ScalarModel(config, compute)
    return _supervised(model, make_reward_loss(model), mesh, _comparisons, count="prompts")


def _supervised(model: Model, loss_fn, mesh, make_batch, count="tokens") -> Problem:
    spec = param_spec(model)
    adapted = getattr(model, "adapter", AdapterConfig()).rank > 0
    rates = make_rates(TrainableConfig(), model.config, spec.shapes, adapted=adapted)
    optimizer = make_optimizer(OPTIMIZER, split(spec.axes, rates)[0])
    shardings = state_shardings(model, optimizer, mesh, rates=rates)
    step = make_train_step(
        loss_fn, optimizer, OPTIMIZER, SCHEDULE, shardings, mesh, rates=rates, count=count
    )
    state = init_state(model, optimizer, mesh, 0, params=_start(model), rates=rates)

    def numbered(state, number):
        return step(state, make_batch(np.random.default_rng(number)))

    return Problem(state, numbered)


def _ppo(config, compute, mesh) -> Problem:
    """Of responses that are given: two epochs of two minibatches a step."""
    models = Models(Transformer(config, compute), ScalarModel(config, compute))
    algorithm = dataclasses.replace(PPO, epochs=2, minibatches=2)
    spec = models.spec()
    optimizer = make_optimizer(OPTIMIZER, spec.axes)
    shardings = rl_shardings(state_shardings(spec, optimizer, mesh), mesh)
    learn = make_learn_step(
        models, algorithm, KLConfig(coefficient=0.1), ROLLOUT, optimizer, OPTIMIZER, SCHEDULE,
        shardings, mesh, tile_tokens=64,
    )  # fmt: skip
    params = {"policy": _start(models.policy), "value": _start(models.value)}
    train = init_state(spec, optimizer, mesh, 0, params=params)
    state = jax.device_put(with_controllers(train, init_controllers(0.1)), shardings)
    lies = make_shardings(mesh, *param_spec(models.policy))
    frozen = {"reference": jax.device_put(_start(models.policy, seed=1), lies)}

    def numbered(state, number):
        random = np.random.default_rng(number)
        placed = place_batch(_responses(random), mesh)
        scores = placed.pop("scores")
        return learn(state, frozen, Rollout(**placed), scores, jnp.uint32(0), None)

    return Problem(state, numbered)


STAGES = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo}


def _start(model: Model, seed: int = 0) -> dict:
    """Return parameters in float64, the same on every mesh, and none of them 0."""
    params = jax.jit(lambda: init_params(model, jax.random.key(seed)))()
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, params))
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + 0.1 * random.standard_normal(x.shape) for x in leaves])


def _packed_rows(random, kept: float) -> dict[str, np.ndarray]:
    """Two documents a row, and padding behind them in some."""
    tokens = random.integers(0, MODEL.vocab_size, (B, T)).astype(np.int32)
    first, end = random.integers(3, T // 2, (B, 1)), random.integers(T // 2, T + 1, (B, 1))
    places = np.arange(T)
    segments = np.where(places < first, 1, np.where(places < end, 2, 0)).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": np.where(places < first, places, places - first).astype(np.int32),
        "loss_weights": ((random.random((B, T)) < kept) & (segments > 0)).astype(np.float32),
        "cursor": np.uint32(0),
    }


def _comparisons(random) -> dict[str, np.ndarray]:
    """Two responses to a prompt, of unlike lengths, one of them better."""
    tokens = random.integers(0, MODEL.vocab_size, (B, 2, T)).astype(np.int32)
    lengths = random.integers(T // 2, T + 1, (B, 2, 1))
    return {
        "tokens": tokens.reshape(B, -1),
        "segment_ids": (np.arange(T) < lengths).astype(np.int32).reshape(B, -1),
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 2)),
        "levels": random.permuted(np.tile(np.arange(2, dtype=np.float32), (B, 1)), axis=1),
        "present": np.ones((B, 2), bool),
        "margins": np.zeros(B, np.float32),
        "cursor": np.uint32(0),
    }


def _responses(random) -> dict[str, np.ndarray]:
    width = T // 2
    lengths = random.integers(1, width + 1, B).astype(np.int32)
    mask = np.arange(width) < lengths[:, None]
    first = random.integers(0, width - 1, B // 2).repeat(2)[:, None]
    real = np.concatenate([np.arange(width) >= first, mask], axis=1)
    return {
        "tokens": random.integers(0, MODEL.vocab_size, (B, T)).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": np.maximum(np.arange(T) - first, 0).astype(np.int32),
        "mask": mask.astype(np.float32),
        "sampler_log_probs": np.where(mask, -5.5, 0.0).astype(np.float32),
        "lengths": lengths,
        "finished": lengths < width,
        "scores": random.normal(size=B).astype(np.float32),
    }


def main(_):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    os.environ.setdefault("NPROC", "256")  # threads of devices that wait for each other
    print("| stage | mesh | loss | first gradient | parameters |\n|---|---|---|---|---|")
    for stage in _STAGES.value:
        references: dict[tuple, Outcome] = {}
        for case in CASES:
            if not re.search(re.escape(_ONLY.value), case.name):
                continue
            alike = tuple(case.model.items())
            if alike not in references:
                references[alike] = run_stage(stage, Case(one(), {}, case.model))
            found, reference = run_stage(stage, case), references[alike]
            cells = " | ".join(
                f"{difference(ours, theirs):.1e}"
                for ours, theirs in zip(found, reference, strict=True)
            )
            print(f"| {stage} | {case.name} | {cells} |", flush=True)


if __name__ == "__main__":
    app.run(main)
