"""A GRPO step against TRL's and Tunix's: one tiny Llama, 8 prompts × 8 responses × 32 tokens, f32.

    python -m benchmarks.rlhf_step [--rounds=3] [--steps=12] [--peers=trl,tunix]

Each round starts all in fresh processes, one after the other; the last line is one JSON object. The
peers are installed for it alone: pip install torch==2.13.0 trl google-tunix. Width 128, 4 layers,
vocabulary 4,096; a step samples, scores by a rule, and makes one update with a KL to a reference.
Each runs as its users run it: XLA_FLAGS, where set, reaches all three.
"""

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
_STEPS = flags.DEFINE_integer("steps", 12, "Steps of each process; the first four are not timed.")
_PEERS = flags.DEFINE_list("peers", ["trl", "tunix"], "Against whom.")
_CHILD = flags.DEFINE_enum("child", None, ["ours", "trl", "tunix"], "Internal: what is measured.")
_FOLDER = flags.DEFINE_string("folder", None, "Internal: weights, tokenizer and prompts.")

PROMPTS, GROUP, RESPONSE_TOKENS, WARM = 8, 8, 32, 4
VOCAB, WIDTH, LAYERS, HEADS, MLP = 4096, 128, 4, 4, 512
LEARNING_RATE, BETA = 1e-4, 0.04


def reward(prompts, responses) -> list[float]:
    """Score by a rule that costs nothing, the same that ours has as a pattern."""
    return [float("qu" in response) for response in responses]


def measure_ours(folder: Path) -> dict:
    from configs.schema import RlhfConfig
    from experiments.entry import tune_for_cpu
    from experiments.loading import load_start
    from experiments.rlhf import rlhf
    from llm.data.config import SourceConfig
    from llm.models.config import ComputeConfig
    from llm.rl.config import AlgorithmConfig, KLConfig, RewardConfig, RolloutConfig
    from llm.rl.prompts import load_prompts
    from llm.training.config import OptimizerConfig
    from llm.training.metrics import read_metrics
    from llm.training.run_config import RunConfig

    tune_for_cpu()  # as every entry point does
    config = RlhfConfig(
        source=str(folder),
        prompts=SourceConfig(
            paths=(str(folder / "prompts.jsonl"),),
            format="prompt_response",
            validation_fraction=0.0,
        ),
        rewards={"rule": RewardConfig(kind="pattern", path=".*qu.*")},
        rollout=RolloutConfig(
            prompts=PROMPTS, group=GROUP, prompt_tokens=32, response_tokens=RESPONSE_TOKENS
        ),
        algorithm=AlgorithmConfig(name="grpo", whiten_advantages=False, missing_eos_penalty=0.0),
        kl=KLConfig(coefficient=BETA, place="loss_k3"),
        compute=ComputeConfig(),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0),
        run=RunConfig(log_every_steps=1, save_every_steps=10**6),
        samples_every_steps=0,
        total_steps=_STEPS.value,
    )
    workdir = folder / f"run_{time.time_ns()}"
    rlhf(config, str(workdir))
    rows = [row for row in read_metrics(workdir) if "perf/generation_seconds" in row][WARM:]
    seconds = {
        name: statistics.median(row[f"perf/{name}_seconds"] for row in rows)
        for name in ("generation", "scoring", "learning")
    }
    steps = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]
    tokens = statistics.median(row["rl/response_tokens"] for row in rows) * PROMPTS * GROUP
    tokenizer = load_start(str(folder), str(workdir)).tokenizer
    prompts = load_prompts(config.prompts, tokenizer, max_tokens=32, max_bad_rows=0).prompts
    lengths = statistics.mean(len(prompt.tokens) for prompt in prompts)
    bound = read_bandwidth() / bytes_per_token(lengths)
    return {
        "cache_bound_tokens_per_second": bound,
        "step_seconds": statistics.median(steps),
        "generation_share": seconds["generation"] / statistics.median(steps),
        "generated_tokens_per_second": tokens / seconds["generation"],
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


def bytes_per_token(prompt_tokens: float) -> float:
    """Return what one more token of one sequence has to read: its keys and values, half written on
    average, and its share of the weights, read once for all sequences. Float32."""
    cached = 2 * LAYERS * WIDTH * (prompt_tokens + RESPONSE_TOKENS / 2)
    weights = VOCAB * WIDTH + LAYERS * WIDTH * (4 * WIDTH + 3 * MLP)
    return 4.0 * (cached + weights / (PROMPTS * GROUP))


def read_bandwidth() -> float:
    """Return bytes a second that a sum over 512 MiB, far more than any cache, reads here."""
    import jax
    import jax.numpy as jnp

    numbers = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(total(numbers))
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds)


def measure_trl(folder: Path) -> dict:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(2)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    clock = _Clock()

    class Timed(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        reward_funcs=lambda prompts, completions, **_: reward(prompts, completions),
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=RESPONSE_TOKENS,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            scale_rewards="none",
            loss_type="dapo",
            max_steps=_STEPS.value,
            save_strategy="no",
            report_to="none",
            logging_steps=10**6,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[Timed()],
    )
    trainer.train()
    return {"step_seconds": clock.median()}


def measure_tunix(folder: Path) -> dict:
    import jax
    import jax.numpy as jnp
    import optax
    import transformers
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    shapes = ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    clock = _Clock()

    def timed_reward(prompts, completions, **_):
        clock.tick()  # once a step: from one step's scores to the next's
        return reward(prompts, completions)

    with mesh:
        cluster = RLCluster(
            actor=Llama3(shapes, rngs=nnx.Rngs(0)),
            reference=Llama3(shapes, rngs=nnx.Rngs(0)),
            tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
            cluster_config=ClusterConfig(
                role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
                rollout_engine="vanilla",
                training_config=RLTrainingConfig(
                    actor_optimizer=optax.adamw(LEARNING_RATE),
                    eval_every_n_steps=10**6,
                    max_steps=_STEPS.value,
                    mini_batch_size=PROMPTS,
                    train_micro_batch_size=PROMPTS,
                ),
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=RESPONSE_TOKENS,
                    max_prompt_length=32,
                    kv_cache_size=64,
                    temperature=1.0,
                    top_p=None,
                    data_type=jnp.float32,
                ),
            ),
        )
        learner = GRPOLearner(
            cluster,
            GRPOConfig(num_generations=GROUP, num_iterations=1, beta=BETA, epsilon=0.2),
            timed_reward,
        )
        batches = [
            {"prompts": np.array([row["prompt"] for row in rows[i : i + PROMPTS]])}
            for i in range(0, len(rows), PROMPTS)
        ]
        learner.train([batches[i % len(batches)] for i in range(_STEPS.value + 1)])
    return {"step_seconds": clock.median()}


class _Clock:
    def __init__(self):
        self.ticks: list[float] = []

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())

    def median(self) -> float:
        return statistics.median(np.diff(self.ticks)[WARM:].tolist())


def write_inputs(folder: Path) -> None:
    """Write random weights, a tokenizer of made-up words, and prompts of one length."""
    import jax

    from llm.data.tokenizer_training import train_tokenizer
    from llm.interop.huggingface import save_huggingface
    from llm.models.config import TransformerConfig
    from llm.models.transformer import Transformer, init_params

    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, n)) for n in random.integers(2, 9, 6000)]
    tokenizer = train_tokenizer([" ".join(words[i : i + 50]) for i in range(0, 6000, 50)], VOCAB)
    config = TransformerConfig(
        vocab_size=VOCAB,
        width=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        mlp_width=MLP,
        max_length_tokens=128,
        tied_head=True,
    )
    params = jax.device_get(init_params(Transformer(config), jax.random.key(0)))
    save_huggingface(folder, config, params, tokenizer)
    with open(folder / "prompts.jsonl", "w") as file:
        for _ in range(64):
            prompt = " ".join(random.choice(words, 5))
            file.write(json.dumps({"prompt": prompt, "response": "e"}) + "\n")


def main(_) -> None:
    if _CHILD.value:
        measure = {"ours": measure_ours, "trl": measure_trl, "tunix": measure_tunix}[_CHILD.value]
        found = measure(Path(_FOLDER.value))
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    results: dict[str, list[dict]] = {name: [] for name in ["ours", *_PEERS.value]}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for _ in range(_ROUNDS.value):
            for name, rounds in results.items():
                command = [sys.executable, "-m", "benchmarks.rlhf_step", f"--child={name}"]
                command += [f"--folder={folder}", f"--steps={_STEPS.value}"]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rounds.append(json.loads(out.splitlines()[-1]))
                print(name, rounds[-1], file=sys.stderr)
    seconds = {n: statistics.median(r["step_seconds"] for r in rs) for n, rs in results.items()}
    ratios = {name: s / seconds["ours"] for name, s in seconds.items() if name != "ours"}
    print(json.dumps({"step_seconds": seconds, "times_as_fast_as": ratios, "rounds": results}))


if __name__ == "__main__":
    app.run(main)
