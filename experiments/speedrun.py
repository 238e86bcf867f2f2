"""The main job: a language model's whole life, with a report of every stage.

    python -m experiments.speedrun --workdir=runs/speedrun

Fetch the corpora → train a tokenizer → pack → pretrain → score held-out text beside compressors and
an n-gram model → sample → fine-tune on instructions → reward models → DPO → PPO → judge →
report.md, report.html, summary.json. Started again it goes on where it stopped. With a GPU the
longer recipe is the default.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from etils import epath

from configs.schema import PretrainConfig, SpeedrunConfig
from experiments import entry
from experiments.loading import load_model
from experiments.pretrain import pretrain
from experiments.run_flags import PROFILE, start_processes
from experiments.speedrun_alignment import align
from experiments.speedrun_report import write_speedrun_report
from experiments.stages import open_job
from experiments.workdir_flag import WORKDIR
from llm.data.prepare import Prepared, prepare
from llm.data.split_rows import SplitRows
from llm.data.tokenizer_training import bytes_per_token, make_tokenizer
from llm.data.tokenizers import Tokenizer
from llm.evaluation.compressors import compressor_bits_per_byte
from llm.evaluation.language_modeling import (
    TextScore,
    make_score_step,
    score_documents,
)
from llm.evaluation.ngram import fit_ngram
from llm.generation.config import SamplingConfig
from llm.generation.generator import Generator
from llm.models.transformer import Transformer
from llm.parallel.mesh import make_mesh


def main(config: SpeedrunConfig) -> None:
    start_processes(config, only_one=True)  # once, for all stages
    workdir = epath.Path(WORKDIR.value)
    stages = open_job(workdir, config, allow_change=config.pretrain.run.allow_config_change)
    recipe = entry.profiled(config.pretrain, PROFILE.value)

    tokenizer_facts = stages.run("tokenizer", lambda: train_tokenizer(recipe))
    tokenizer = make_tokenizer(recipe.data)
    data_facts = stages.run("data", lambda: prepare_data(recipe, tokenizer))
    prepared = prepare(recipe.data, tokenizer)
    stages.run("pretrain", lambda: pretrain(recipe, str(workdir / "pretrain")))
    model_bits = stages.run("evaluate", lambda: evaluate(config, workdir / "pretrain", prepared))
    baselines = stages.run("baselines", lambda: measure_baselines(config, tokenizer, prepared))
    samples = stages.run("samples", lambda: sample(config, workdir / "pretrain"))
    alignment = align(config, workdir, stages)
    write_speedrun_report(
        workdir,
        config,
        tokenizer=tokenizer_facts,
        data=data_facts,
        bits_per_byte={"model": model_bits} | baselines,
        samples=samples,
        alignment=alignment,
        wall_seconds=stages.wall_seconds,
    )
    print(f"report: {workdir / 'report.html'} (and report.md, summary.json)")


def train_tokenizer(recipe: PretrainConfig) -> dict:
    """Train the tokenizer into the cache."""
    tokenizer = make_tokenizer(recipe.data)
    return {"vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}


def prepare_data(recipe: PretrainConfig, tokenizer: Tokenizer) -> dict:
    """Tokenise and pack; return documents, tokens and bytes of each source, and its fill rate."""
    prepared = prepare(recipe.data, tokenizer)
    facts = {}
    for name, split in prepared.train.items():
        rows = SplitRows(split, recipe.data.length_tokens, recipe.data.seed)
        held_out = prepared.validation[name]
        facts[name] = {
            "documents": split.num_documents,
            "tokens": int(split.num_tokens.sum()),
            "bytes": int(split.num_bytes.sum()),
            "rows": rows.num_rows,
            "fill_rate": rows.fill_rate,
            "bytes_per_token": bytes_per_token(tokenizer, texts_of(held_out, tokenizer)),
            "held_out_documents": held_out.num_documents,
            "held_out_tokens": int(held_out.num_tokens.sum()),
            "held_out_bytes": int(held_out.num_bytes.sum()),
        }
    return facts


def evaluate(config: SpeedrunConfig, workdir: epath.Path, prepared: Prepared) -> dict[str, float]:
    """Return the model's bits per byte of held-out text by domain."""
    recipe = config.pretrain
    loaded = load_model(str(workdir), ema=recipe.optimizer.ema_decay is not None)
    mesh = make_mesh(recipe.mesh)
    score_step = make_score_step(
        Transformer(recipe.model, recipe.compute), mesh, tile_tokens=recipe.loss_tile_tokens
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(loaded.params)
        scores = {
            name: score_documents(
                score_step,
                params,
                split.documents(),
                row_length=recipe.data.length_tokens,
                batch_tokens=recipe.tokens_per_step,
                stride=config.window_stride_tokens,
            )
            for name, split in prepared.validation.items()
        }
    scores["all"] = sum(scores.values(), TextScore(0.0, 0.0, 0.0))
    return {name: score.bits_per_byte for name, score in scores.items()}


def measure_baselines(
    config: SpeedrunConfig, tokenizer: Tokenizer, prepared: Prepared
) -> dict[str, dict[str, float]]:
    """Return bits per byte by predictor and domain: compressors on bytes, the n-gram on tokens."""
    held_out = {name: texts_of(split, tokenizer) for name, split in prepared.validation.items()}
    training = [text for split in prepared.train.values() for text in texts_of(split, tokenizer)]
    bits = compressor_bits_per_byte(held_out, training)
    ngram = fit_ngram(
        (split.tokens(i) for split in prepared.train.values() for i in range(split.num_documents)),
        config.ngram_order,
        tokenizer.vocab_size,
    )
    scores = {}
    for name, split in prepared.validation.items():
        documents = [document.tokens for document in split.documents()]
        nats = -sum(float(np.sum(log_probs)) for log_probs in ngram.log_probs_of(documents))
        scores[name] = TextScore(nats, float(split.num_pairs.sum()), float(split.num_bytes.sum()))
    scores["all"] = sum(scores.values(), TextScore(0.0, 0.0, 0.0))
    return bits | {"ngram": {name: score.bits_per_byte for name, score in scores.items()}}


def sample(config: SpeedrunConfig, workdir: epath.Path) -> list[dict[str, str]]:
    """Return continuations of the config's prompts."""
    recipe = config.pretrain
    loaded = load_model(str(workdir), ema=recipe.optimizer.ema_decay is not None)
    sampling = SamplingConfig(config.sample_tokens, config.sample_temperature)
    generator = Generator(Transformer(recipe.model, recipe.compute), loaded.tokenizer, sampling)
    prompts = [prompt for prompt in config.prompts for _ in range(config.samples_per_prompt)]
    texts = generator(jax.device_put(loaded.params), prompts, jax.random.key(recipe.seed))
    return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]


def texts_of(split, tokenizer: Tokenizer) -> list[str]:
    """Return the documents of a split as text: byte-level tokens give every byte back."""
    return [tokenizer.decode(split.tokens(i)[1:-1].tolist()) for i in range(split.num_documents)]


def default_recipe() -> str:
    """Return the longer recipe where JAX will find a GPU, told without starting JAX."""
    gpu = Path("/dev/nvidiactl").exists() and any(
        importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
    )
    return "configs/speedrun_long.py" if gpu else "configs/speedrun.py"


if __name__ == "__main__":
    entry.run(main, SpeedrunConfig, default_config=default_recipe())
