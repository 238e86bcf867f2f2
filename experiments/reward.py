"""Train a reward model: a language model's trunk under a scalar head, on human feedback.

    python -m experiments.reward --config=configs/reward_tiny.py --workdir=runs/tiny_reward

At the end scores are shifted and scaled to mean 0 and variance 1 over all held-out responses, or
those it was trained on where none are held out (scale.json); held-out accuracy, calibration and
accuracy by the labels' margin, over all pairs of a prompt's responses, are written to
preferences.json. experiments.rlhf takes the workdir as a reward.
"""

import dataclasses
import json

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import RewardModelConfig
from experiments import entry
from experiments.assembly_reward import assemble_reward_training
from experiments.feedback import feedback_digests, load_comparisons
from experiments.loading import Start, load_start
from experiments.rewards import SCALE
from experiments.run_flags import PROFILE, start_processes
from experiments.workdir_flag import WORKDIR
from llm.data.comparisons import ComparisonBatches, EncodedFeedback, spread
from llm.evaluation.preferences import PreferenceReport, compare_pairs, report_preferences
from llm.models.adapters import adapt_params
from llm.models.on_mesh import check_on_mesh
from llm.models.scalar import ScalarModel
from llm.models.transformer import param_shapes
from llm.parallel.hosts import host_share, place_batch
from llm.parallel.mesh import make_mesh
from llm.training.files import write_atomically
from llm.training.preference_loss import response_scores
from llm.training.replay import replayed
from llm.training.run import Run
from llm.training.run_config import check_config
from llm.training.state import TrainState, averaged_params

REPORT = "preferences.json"


def train_reward(config: RewardModelConfig, workdir: str) -> None:
    """Train, or go on training, a reward model on the config's feedback."""
    start = load_start(config.source, workdir, config.chat_template)
    model_config = dataclasses.replace(start.config, dropout_rate=config.dropout_rate)
    fields = dataclasses.asdict(config) | {"model": dataclasses.asdict(model_config)}
    check_config(workdir, fields, allow_change=config.run.allow_config_change)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_on_mesh(model_config, config.compute, mesh)

    # Data
    pairs_only = config.tie_threshold == 0
    encoded, told = load_comparisons(config, start.tokenizer, pairs_only=pairs_only)
    share = host_share(mesh)
    hosts = dict(host_index=share.index, host_count=share.count)
    batches = ComparisonBatches(encoded["train"], config.comparisons, **hosts)
    digests = feedback_digests(encoded, start.tokenizer)
    total_steps = config.num_steps(len(batches.records))

    # Model, loss, optimizer
    training = assemble_reward_training(config, model_config, mesh, total_steps)
    model, train_step = training.model, replayed(training.train_step, config.run.replay_every_steps)
    score_step = make_score_step(model, mesh)

    def evaluate(run: Run, state: TrainState) -> None:
        if "validation" in encoded:
            params = averaged_params(state)
            show(run, measure(score_step, params, encoded["validation"], config))

    # Run
    run = Run(
        workdir,
        fields,
        config.run,
        total_steps=total_steps,
        tokens_per_step=config.tokens_per_step,
        code=__file__,
    )
    with jax.set_mesh(mesh), run:
        run.check_data(digests)
        for line in told:
            run.say(line)
        start.tokenizer.save(run.workdir / "tokenizer")
        params = init_params(start, model, config.seed)
        state = training.init_state(mesh, config.seed, params=params)

        # Restore
        state, batches = run.restore(state, batches)
        if run.due(config.evaluate_every_steps):
            evaluate(run, state)

        # Loop
        while run.step < run.total_steps:
            batch = next(batches)
            state, metrics = train_step(state, batch)
            state = run.after_step(state, metrics)
            if run.due(config.evaluate_every_steps):
                evaluate(run, state)

        finish(run, score_step, averaged_params(state), encoded, config)


def init_params(start: Start, model: ScalarModel, seed: int) -> dict | None:
    """Return the source's trunk under a head of zeros; None where a run goes on."""
    base = start.params()
    if base is None:
        return None
    trunk = {name: part for name, part in base.items() if name != "head"}
    head = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(model)["score"])
    return adapt_params(model, {"trunk": trunk, "score": head}, jax.random.key(seed))


def make_score_step(model: ScalarModel, mesh: Mesh):
    """Return (parameters, global batch) → its scores [G K] as NumPy, the same on every host."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    score = jax.jit(
        lambda params, batch: response_scores(model, params, batch), out_shardings=everywhere
    )

    def step(params: dict, batch: dict) -> np.ndarray:
        share = host_share(mesh)
        arrays = {name: share.of(x) for name, x in batch.items() if name != "cursor"}
        return np.asarray(score(params, place_batch(arrays, mesh)))

    return step


def score_all(
    score_step, params: dict, records: list[EncodedFeedback], config: RewardModelConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the scores and the levels of all responses of each record, in the same order."""
    pieces = spread(records, config.comparisons.max_responses)
    scores, levels = [], []
    for batch in ComparisonBatches(pieces, config.comparisons, one_pass=True):
        scores.append(score_step(params, batch)[batch["present"]].astype(np.float64))
        levels.append(batch["levels"][batch["present"]].astype(np.float64))
    ends = np.cumsum([len(record.rows) for record in records])[:-1]
    return np.split(np.concatenate(scores), ends), np.split(np.concatenate(levels), ends)


def measure(
    score_step, params: dict, records: list[EncodedFeedback], config: RewardModelConfig
) -> PreferenceReport:
    """Return accuracy and calibration on held-out feedback."""
    return judge(*score_all(score_step, params, records, config), records, config)


def judge(
    scores: list[np.ndarray],
    levels: list[np.ndarray],
    records: list[EncodedFeedback],
    config: RewardModelConfig,
) -> PreferenceReport:
    """Return the same of responses that are scored already."""
    pairs = compare_pairs(scores, levels, [record.margin for record in records])
    return report_preferences(*pairs, num_bins=config.calibration_bins)


def show(run: Run, report: PreferenceReport) -> None:
    """Write held-out figures to the run's logs."""
    run.write_metrics(
        {
            "eval/accuracy": report.accuracy,
            "eval/loss": report.loss_nats,
            "eval/calibration_error": report.calibration_error,
        }
    )
    run.say(
        f"step {run.step}: held-out accuracy {report.accuracy:.4f} over {report.pairs} pairs, "
        f"loss {report.loss_nats:.4f}, calibration error {report.calibration_error:.4f}"
    )


def finish(
    run: Run, score_step, params: dict, encoded: dict[str, list], config: RewardModelConfig
) -> None:
    """Write what those need who use the scores: scale.json, and how far to trust them."""
    held_out = "validation" in encoded
    most = config.comparisons.max_validation_prompts
    records = encoded["validation"] if held_out else encoded["train"][:most]
    scores, levels = score_all(score_step, params, records, config)
    together = np.concatenate(scores)
    scale = {"shift": float(together.mean()), "scale": float(together.std()) or 1.0}
    write_atomically(run.workdir / SCALE, json.dumps(scale, indent=2) + "\n")
    if held_out:
        report = judge(scores, levels, records, config)
        text = json.dumps(entry.plain(report), indent=2)
        write_atomically(run.workdir / REPORT, text + "\n")


def main(config: RewardModelConfig) -> None:
    start_processes(config)
    train_reward(entry.profiled(config, PROFILE.value), WORKDIR.value)


if __name__ == "__main__":
    entry.run(main, RewardModelConfig)
