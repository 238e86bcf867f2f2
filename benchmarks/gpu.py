"""What one GPU gets out of the models: MFU, attention kernels, packed segments, decoding.

    python -m benchmarks.gpu [--only=matrix,attention,train,decode] [--smoke]

The last line is one JSON object. --smoke runs the same code on tiny shapes, on any backend: it says
that the script works, and nothing about speed.
"""

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from llm.generation.config import SamplingConfig
from llm.generation.decode import make_generate
from llm.generation.prompts import sequence_keys
from llm.models.attention_kernels import attend
from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.masks import AttentionPattern
from llm.models.presets import PRESETS
from llm.models.transformer import Transformer, init_params, logical_axes
from llm.models.unstack import unstack, unstacked
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.scaling.accounting import num_params, training_flops_per_token
from llm.scaling.hardware import peak_flops
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import init_state, state_shardings
from llm.training.step import make_train_step, place_batch

_ONLY = flags.DEFINE_list("only", ["matrix", "attention", "train", "decode"], "Parts to run.")
_SMOKE = flags.DEFINE_boolean("smoke", False, "Tiny shapes, two repetitions.")
_CALLS = flags.DEFINE_integer("calls", 20, "Timed repetitions; the median counts.", 1)

# (preset, length, sequences, remat): what is trained, in this order
TRAINING = [
    ("gpt2-124m", 1024, 32, "none"),
    ("gpt2-355m", 1024, 16, "none"),
    ("gpt3-1.3b", 1024, 8, "attention"),
    ("gpt3-1.3b", 2048, 4, "attention"),
]
TINY = TransformerConfig(
    vocab_size=500, width=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, mlp_width=128
)


def seconds(call) -> float:
    """Return the median time of a call that is already compiled, each waited for."""
    jax.block_until_ready(call())
    times = []
    for _ in range(2 if _SMOKE.value else _CALLS.value):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_matrix() -> dict:
    """The chip's rate of bf16 products, in FLOPs a second, and of copies, in bytes a second."""
    n = 128 if _SMOKE.value else 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    product = seconds(jax.jit(lambda: a @ a))
    stream = jnp.ones(n * n * 4, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return {
        "matrix_flops": 2 * n**3 / product,
        "copy_bytes": 2 * stream.nbytes / seconds(lambda: copy(stream)),
    }


def packed_segments(batch: int, length: int) -> np.ndarray:
    """Documents of unequal lengths side by side, padding at the end, another cut in each row."""
    random = np.random.default_rng(0)
    cuts = np.sort(random.integers(0, length, (batch, 7)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    segments[:, length - length // 16 :] = 0
    return segments.astype(np.int32)


def measure_attention() -> dict:
    """Forward and backward of each kernel, plain and packed, with its distance from float32."""
    b, t, n, h = (2, 128, 2, 64) if _SMOKE.value else (8, 2048, 16, 128)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (b, t, n, h), jnp.bfloat16) for key in keys)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    report = {}
    for name, segments in {"causal": None, "packed": packed_segments(b, t)}.items():
        ids = None if segments is None else jnp.asarray(segments)
        pattern = AttentionPattern("causal", query_segments=ids, key_segments=ids)
        seen = jnp.ones((b, t), bool) if ids is None else ids > 0

        def run(kernel, *qkv, pattern=pattern, seen=seen):
            def total(q, k, v):
                out = attend(q, k, v, pattern, kernel=kernel)
                out = jnp.where(seen[..., None, None], out, 0)  # padding's output is arbitrary
                return jnp.sum(out.astype(jnp.float32) ** 2), out

            grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
            return out, *grads

        exact = jax.jit(lambda *x, run=run: run("xla", *x))(
            *(x.astype(jnp.float32) for x in (q, k, v))
        )
        for kernel in ("xla", "blocked") + (("cudnn",) if jax.default_backend() == "gpu" else ()):
            step = jax.jit(lambda *x, run=run, kernel=kernel: run(kernel, *x))
            errors = [
                float(jnp.linalg.norm(found.astype(jnp.float32) - true) / jnp.linalg.norm(true))
                for found, true in zip(step(q, k, v), exact, strict=True)
            ]
            report[f"{kernel} {name}"] = {
                "seconds": seconds(lambda step=step: step(q, k, v)),
                "relative_error": dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
            }
    return report


def measure_training(rate: float) -> dict:
    """A whole training step of packed rows: bf16 products, float32 weights, AdamW."""
    runs = [(TINY, 128, 2, "none")] if _SMOKE.value else TRAINING
    mesh, report = make_mesh(MeshConfig(), jax.devices()[:1]), {}
    for preset, length, sequences, remat in runs:
        config = preset if _SMOKE.value else PRESETS[preset]
        config = dataclasses.replace(config, max_length_tokens=length)
        tokens_per_step = sequences * length
        step_seconds = _time_training(config, remat, length, sequences, mesh)
        flops = training_flops_per_token(config, length) * tokens_per_step / step_seconds
        peak = peak_flops(jax.devices()[:1])
        report["tiny" if _SMOKE.value else f"{preset} at {length}"] = {
            "sequences": sequences,
            "remat": remat,
            "step_seconds": step_seconds,
            "tokens_per_second": tokens_per_step / step_seconds,
            "mfu": flops / peak if peak else None,
            "of_matrix_rate": flops / rate,
            "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
    return report


def _time_training(config, remat: str, length: int, sequences: int, mesh) -> float:
    model = Transformer(config, ComputeConfig(dtype="bfloat16", remat=remat))
    optimizer_config = OptimizerConfig()
    optimizer = make_optimizer(optimizer_config, logical_axes(model))
    schedule = make_schedule(
        ScheduleConfig("constant"), total_steps=1000, tokens_per_step=sequences * length
    )
    shardings = state_shardings(model, optimizer, mesh)
    step = make_train_step(
        make_causal_lm_loss(model), optimizer, optimizer_config, schedule, shardings, mesh
    )
    random = np.random.default_rng(0)
    rows = random.integers(0, config.vocab_size, (sequences, length + 1)).astype(np.int32)
    segments = packed_segments(sequences, length)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": np.tile(np.arange(length, dtype=np.int32), (sequences, 1)),
        "cursor": np.uint32(0),
    }
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, 0)
        batch = place_batch(batch, mesh)

        def one():
            nonlocal state
            state, metrics = step(state, batch)
            return state, metrics

        return seconds(one)


def measure_decoding(bandwidth: float) -> dict:
    """One more token for each sequence, against reading weights and cache from memory once."""
    presets = {"tiny": TINY} if _SMOKE.value else {k: PRESETS[k] for k in ("gpt3-1.3b",)}
    prompt, new = (16, 8) if _SMOKE.value else (512, 128)
    report = {}
    for name, config in presets.items():
        model = Transformer(config, ComputeConfig(dtype="bfloat16"))
        params = jax.jit(lambda key, model=model: unstack(model, init_params(model, key)))(
            jax.random.key(0)
        )
        for batch in (1, 64):
            rows = jnp.ones((batch, prompt), jnp.int32)
            inputs = rows, jnp.full(batch, prompt), sequence_keys(jax.random.key(0), batch)

            def call(new_tokens, model=model, params=params, inputs=inputs):
                sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=0.0)
                generate = make_generate(unstacked(model), sampling)
                return seconds(lambda: generate(params, *inputs))

            step_seconds = (call(new) - call(1)) / (new - 1)
            cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim  # bf16 K and V
            cache_bytes = batch * cache * (prompt + new / 2)
            bound = (2 * num_params(config) + cache_bytes) / bandwidth
            report[f"{name}, batch {batch}"] = {
                "step_seconds": step_seconds,
                "tokens_per_second": batch / step_seconds,
                "of_bandwidth_bound": bound / step_seconds,
            }
    return report


def main(_) -> None:
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    report["matrix"] = measure_matrix()
    if "attention" in _ONLY.value:
        report["attention"] = measure_attention()
    if "train" in _ONLY.value:
        report["train"] = measure_training(report["matrix"]["matrix_flops"])
    if "decode" in _ONLY.value:
        report["decode"] = measure_decoding(report["matrix"]["copy_bytes"])
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
