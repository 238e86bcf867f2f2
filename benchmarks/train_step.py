"""A training step against `transformers` GPT-2 on torch: same weights, batches and AdamW.

    python -m benchmarks.train_step [--rounds=3] [--steps=10]

Each round starts both in fresh processes, one after the other; the last line is one JSON object.
13.8M parameters: 6 layers, width 384, 6 heads, vocabulary 8,192, T 256, B 8.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Fresh processes of each.")
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps of each process.")
_CHILD = flags.DEFINE_enum(
    "child", None, ["ours", "torch"], "Internal: what this process measures."
)
_FOLDER = flags.DEFINE_string("folder", None, "Internal: weights and batches.")

B, T, VOCAB, LOSSES = 8, 256, 8192, 5
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


def model_config():
    from llm.models.presets import PRESETS

    return dataclasses.replace(
        PRESETS["gpt2-124m"],
        vocab_size=VOCAB,
        width=384,
        num_layers=6,
        num_heads=6,
        num_kv_heads=6,
        mlp_width=4 * 384,
        max_length_tokens=T,
    )


def batches(count: int) -> np.ndarray:
    """Tokens of a Zipf-like unigram law, T + 1 a row: input and target."""
    random = np.random.default_rng(0)
    law = 1 / np.arange(1, VOCAB + 1)
    return random.choice(VOCAB, (count, B, T + 1), p=law / law.sum()).astype(np.int32)


def measure_ours(folder: Path) -> dict:
    import jax

    from llm.interop.huggingface import load_huggingface
    from llm.models.config import ComputeConfig
    from llm.models.transformer import Transformer, logical_axes
    from llm.parallel.config import MeshConfig
    from llm.parallel.mesh import make_mesh
    from llm.training.config import OptimizerConfig, ScheduleConfig
    from llm.training.loss import make_causal_lm_loss
    from llm.training.optimizers import make_optimizer
    from llm.training.schedules import make_schedule
    from llm.training.state import init_state, state_shardings
    from llm.training.step import make_train_step

    start = time.perf_counter()
    checkpoint = load_huggingface(folder)
    model, mesh = Transformer(checkpoint.config, ComputeConfig()), make_mesh(MeshConfig())
    config = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        clip_norm=CLIP,
    )
    optimizer = make_optimizer(config, logical_axes(model))
    schedule = make_schedule(ScheduleConfig("constant"), total_steps=1000, tokens_per_step=B * T)
    step = make_train_step(
        make_causal_lm_loss(model),
        optimizer,
        config,
        schedule,
        state_shardings(model, optimizer, mesh),
        mesh,
    )
    state = init_state(model, optimizer, mesh, 0, params=checkpoint.params)
    same = {
        "loss_weights": np.ones((B, T), np.float32),
        "segment_ids": np.ones((B, T), np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "cursor": np.uint32(0),
    }

    def one(rows):
        nonlocal state
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], **same}
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return metrics["train/loss"]

    with jax.set_mesh(mesh):
        return _time(one, start)


def measure_torch(folder: Path) -> dict:
    import torch
    import transformers

    start = time.perf_counter()
    torch.set_num_threads(2)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    # the embeddings decay, as in our default; fused: torch's fastest AdamW
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPSILON, fused=True)

    def one(rows):
        rows = torch.from_numpy(rows).long()
        optimizer.zero_grad()
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return _time(one, start)


def _time(one, start: float) -> dict:
    rows = batches(LOSSES + _STEPS.value)
    losses = [float(one(rows[0]))]
    first = time.perf_counter() - start
    losses += [float(one(x)) for x in rows[1:LOSSES]]
    seconds = []
    for x in rows[LOSSES:]:
        begin = time.perf_counter()
        one(x)
        seconds.append(time.perf_counter() - begin)
    return {
        "losses": losses,
        "step_seconds": statistics.median(seconds),
        "first_step_seconds": first,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def write_weights(folder: Path) -> None:
    import jax

    from llm.interop.huggingface import save_huggingface
    from llm.models.transformer import Transformer, init_params

    config = model_config()
    save_huggingface(
        folder, config, jax.device_get(init_params(Transformer(config), jax.random.key(0)))
    )


def main(_) -> None:
    if _CHILD.value:
        measure = {"ours": measure_ours, "torch": measure_torch}[_CHILD.value]
        print(json.dumps(measure(Path(_FOLDER.value))))
        return
    results = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        for _ in range(_ROUNDS.value):
            for name, rounds in results.items():
                command = [sys.executable, "-m", "benchmarks.train_step", f"--child={name}"]
                command += [f"--folder={folder}", f"--steps={_STEPS.value}"]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rounds.append(json.loads(out.splitlines()[-1]))
                print(name, {k: v for k, v in rounds[-1].items() if k != "losses"}, file=sys.stderr)
    report = {
        name: {
            "tokens_per_second": B * T / statistics.median(r["step_seconds"] for r in rounds),
            "first_step_seconds": statistics.median(r["first_step_seconds"] for r in rounds),
            "peak_mib": max(r["peak_mib"] for r in rounds),
            "losses": rounds[0]["losses"],
        }
        for name, rounds in results.items()
    }
    ours, torch = report["ours"], report["torch"]
    report["ratio"] = ours["tokens_per_second"] / torch["tokens_per_second"]
    report["largest_loss_difference"] = float(
        np.max(np.abs(np.subtract(ours["losses"], torch["losses"])))
    )
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
