"""What the loops of pretraining and fine-tuning measure: held-out text, and samples."""

from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from configs.schema import TrainingConfig
from llm.data.prepared import PreparedSplit
from llm.data.tokenizers import Tokenizer
from llm.evaluation.language_modeling import make_score_step, score_splits
from llm.generation.config import SamplingConfig
from llm.generation.generator import Generator
from llm.models.transformer import Transformer
from llm.parallel.hosts import host_share
from llm.training.run import Run
from llm.training.state import TrainState, averaged_params


def make_evaluation(
    config: TrainingConfig,
    model: Transformer,
    mesh: Mesh,
    tokenizer: Tokenizer,
    splits: Mapping[str, PreparedSplit],
    *,
    chat: bool = False,
) -> Callable[[Run, TrainState], None]:
    """Return (run, state) → None: held-out bits per byte, and samples, to the run's logs.

    With `chat`, prompts are what a user says, and samples the assistant's answers.
    """
    score_step = make_score_step(model, mesh, tile_tokens=config.loss_tile_tokens)
    sampling = SamplingConfig(max_new_tokens=config.evaluation.sample_tokens, temperature=0.0)
    generator = Generator(model, tokenizer, sampling) if config.evaluation.prompts else None

    def encode(prompt: str) -> list[int]:
        if not chat:
            return generator.encode(prompt)
        return tokenizer.encode_chat([{"role": "user", "content": prompt}], True)

    def evaluate(run: Run, state: TrainState) -> None:
        params = averaged_params(state)
        metrics = score_splits(
            score_step,
            params,
            splits,
            row_length=config.data.length_tokens,
            batch_sequences=config.data.batch_sequences,
            max_sequences=config.evaluation.max_sequences,
            share=host_share(mesh),
        )
        run.write_metrics(metrics)
        scores = [f"{k[5:]} {v:.4f}" for k, v in metrics.items() if k.endswith("bits_per_byte")]
        run.say(f"step {run.step}: {', '.join(scores)}")
        if generator is not None:
            prompts = config.evaluation.prompts
            answers = generator.complete(params, [encode(prompt) for prompt in prompts])
            texts = {p: answer.text for p, answer in zip(prompts, answers, strict=True)}
            run.write_texts({f"samples/{prompt}": prompt + texts[prompt] for prompt in prompts})
            for prompt, text in texts.items():
                run.say(f"  {prompt}|{text}")

    return evaluate
