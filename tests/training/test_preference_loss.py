"""Losses on comparisons as the stages use them, against loops over single texts in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.data.comparisons import ComparisonBatches, encode_feedback
from llm.data.config import ComparisonsConfig
from llm.data.feedback import Feedback
from llm.data.tokenizer_training import byte_tokenizer
from llm.models.config import TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer, logical_axes, param_shapes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.training.config import OptimizerConfig, PreferenceConfig, ScheduleConfig
from llm.training.optimizers import make_optimizer
from llm.training.preference_loss import (
    make_preference_loss,
    make_reference_step,
    make_reward_loss,
    mismatched,
)
from llm.training.schedules import make_schedule
from llm.training.state import init_state, state_shardings
from llm.training.step import make_train_step

TOKENIZER = byte_tokenizer()
CONFIG = TransformerConfig(
    vocab_size=264,
    width=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=32,
    max_length_tokens=32,
)
MODEL, REWARD = Transformer(CONFIG), ScalarModel(CONFIG)
LENGTH, SLOTS, BETA = 24, 3, 0.3
METHODS = ("dpo", "ipo", "kto", "orpo", "simpo")
# An epsilon above the rounding of gradients that are 0: a score's bias has no effect on pairs.
ADAM = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, epsilon=1e-4)
# Prompts, answers, levels and margins; the fifth asks what the first does.
FEEDBACK = (
    ("apple", ("aaa", "b", "cc"), (3.0, 2.0, 1.0), 0.0),
    ("bee", ("yes", "no"), (1.0, 0.0), 0.4),
    ("cat", ("x", "y", "zzzz"), (1.0, 1.0, 0.0), 0.0),
    ("dog", ("long one", "s"), (0.0, 1.0), 0.0),
    ("apple", ("d", "ee"), (1.0, 0.0), 0.0),
    ("eel", ("f", "g"), (0.5, 0.25), 1.5),
)
THUMBS = tuple((asked, answers[:1], (1.0,), 0.0) for asked, answers, *_ in FEEDBACK[:4])


@functools.cache
def batch_of(feedback=FEEDBACK):
    records = [
        Feedback("rating", ({"role": "user", "content": asked},), answers, levels, margin)
        for asked, answers, levels, margin in feedback
    ]
    encoded, cut = encode_feedback(records, TOKENIZER, LENGTH, pairs_only=False)
    assert not cut
    config = ComparisonsConfig(
        length_tokens=LENGTH, batch_prompts=len(records), max_responses=SLOTS
    )
    (batch,) = ComparisonBatches(encoded, config, one_pass=True)
    return batch


@functools.cache
def params_of(model, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: random.normal(0, 0.3, x.shape).astype(x.dtype), param_shapes(model)
    )


@functools.cache
def forward(model):
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))


def spelled(asked, answer):
    """A prompt and an answer as tokens by hand, and where the answer begins."""
    prompt = [256, 260, *asked.encode(), 257, 261]
    return [*prompt, *answer.encode(), 257], len(prompt)


def log_prob(params, asked, answer):
    """An answer's log-probability, from the logits of its text alone, without padding."""
    tokens, start = spelled(asked, answer)
    logits = np.asarray(forward(MODEL)(params, np.array([tokens])), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logs[i - 1, tokens[i]] for i in range(start, len(tokens)))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def pair_loss(method, better, worse):
    """One pair's loss by its paper; a response is (policy, reference, tokens)."""
    (c, rc, nc), (r, rr, nr) = better, worse
    h = (c - rc) - (r - rr)
    good, bad = c / nc, r / nr
    odds = good - bad - (np.log1p(-np.exp(good)) - np.log1p(-np.exp(bad)))
    return {
        "dpo": -log_sigmoid(BETA * h),
        "ipo": (h - 1 / (2 * BETA)) ** 2,
        "orpo": -good - BETA * log_sigmoid(odds),
        "simpo": -log_sigmoid(BETA * (good - bad) - 0.5),
    }[method]


def mean_pair_loss(method, params, reference):
    """The mean over prompts of the mean over their pairs."""
    means = []
    for asked, answers, levels, _ in FEEDBACK:
        said = [
            (log_prob(params, asked, a), log_prob(reference, asked, a), len(a) + 1) for a in answers
        ]
        means.append(
            np.mean(
                [
                    pair_loss(method, said[i], said[j])
                    for i, j in itertools.permutations(range(len(said)), 2)
                    if levels[i] > levels[j]
                ]
            )
        )
    return np.mean(means)


def divergence(feedback, params, reference):
    """KTO's estimate: each prompt with the answers of the next one that asks something else."""
    ratios = []
    for g, (asked, answers, *_) in enumerate(feedback):
        following = (*feedback[g + 1 :], *feedback[:g])
        theirs = next(other[1] for other in following if other[0] != asked)
        for k in range(len(answers)):
            answer = theirs[k % len(theirs)]
            ratios.append(log_prob(params, asked, answer) - log_prob(reference, asked, answer))
    return np.mean(ratios)


def mean_kto_loss(feedback, params, reference, good=1.0, bad=1.0):
    z = max(0.0, divergence(feedback, params, reference))
    means = []
    for asked, answers, levels, _ in feedback:
        each = []
        for answer, level in zip(answers, levels, strict=True):
            ratio = log_prob(params, asked, answer) - log_prob(reference, asked, answer)
            up, down = BETA * (ratio - z), BETA * (z - ratio)
            each.append(
                good * (1 - 1 / (1 + np.exp(-up)))
                if level >= 0.5
                else bad * (1 - 1 / (1 + np.exp(-down)))
            )
        means.append(np.mean(each))
    return np.mean(means)


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def steps(model, loss_fn, feedback, params, before=lambda params, batch: batch, **options):
    """Take steps with the stage's train step; return the state and the metrics of each."""
    mesh, optimizer = one_device(), make_optimizer(ADAM, logical_axes(model))
    count = options.pop("count_steps", 1)
    schedule = make_schedule(ScheduleConfig(name="constant"), total_steps=9, tokens_per_step=1)
    shardings = state_shardings(model, optimizer, mesh)
    step = make_train_step(
        loss_fn, optimizer, ADAM, schedule, shardings, mesh, count="prompts", **options
    )
    found = []
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, 0, params=params)
        for _ in range(count):
            state, metrics = step(state, before(state.params, batch_of(feedback)))
            found.append({name: float(x) for name, x in metrics.items()})
    return state, found


def prefer(method, feedback=FEEDBACK, policy_seed=0, reference_seed=0, weights=(1.0, 1.0), **more):
    """The preference stage's own loss and reference, on `steps`."""
    config = PreferenceConfig(
        method, BETA, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    look = make_reference_step(MODEL, MODEL, one_device(), config, tile_tokens=32)
    loss_fn = make_preference_loss(MODEL, config, tile_tokens=32)
    reference = params_of(MODEL, reference_seed)
    return steps(
        MODEL,
        loss_fn,
        feedback,
        params_of(MODEL, policy_seed),
        lambda params, batch: look(params, reference, batch),
        **more,
    )


@pytest.mark.parametrize(
    ("method", "first"), [("dpo", np.log(2)), ("ipo", (0.5 / BETA) ** 2), ("kto", 0.5)]
)
def test_the_first_loss_of_a_policy_that_is_its_reference(method, first):
    _, (metrics,) = prefer(method)
    assert metrics["train/loss"] == pytest.approx(first, rel=1e-5)
    assert metrics["train/prompts"] == 6 and metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_means_over_prompts_of_their_papers_equations(method):
    _, (metrics,) = prefer(method, policy_seed=1)
    params, reference = params_of(MODEL, 1), params_of(MODEL, 0)
    if method == "kto":
        expected = mean_kto_loss(FEEDBACK, params, reference)
    else:
        expected = mean_pair_loss(method, params, reference)
    assert metrics["train/loss"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "method",
    [
        method if method in ("dpo", "kto") else pytest.param(method, marks=pytest.mark.long)
        for method in METHODS
    ],
)
def test_preference_steps_are_the_same_in_parts(method):
    whole, whole_metrics = prefer(method, policy_seed=1, count_steps=2)
    parts, parts_metrics = prefer(method, policy_seed=1, count_steps=2, accumulate_steps=2)
    assert_same_steps(whole, whole_metrics, parts, parts_metrics)


def assert_same_steps(whole, whole_metrics, parts, parts_metrics):
    for ours, theirs in zip(whole_metrics, parts_metrics, strict=True):
        for name in ("train/loss", "train/accuracy", "train/grad_norm", "train/prompts"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole.params, parts.params
    )


# --- KTO's reference point ------------------------------------------------------------------


def test_thumbs_have_a_reference_point_once_the_policy_moves():
    """All thumbs are up: answers become likelier, after other prompts as well."""
    state, _ = prefer("kto", THUMBS, count_steps=3)
    params, reference = jax.device_get(state.params), params_of(MODEL, 0)
    config = PreferenceConfig("kto", BETA)
    found = make_reference_step(MODEL, MODEL, one_device(), config)(
        params, reference, batch_of(THUMBS)
    )
    expected = divergence(THUMBS, params, reference)
    assert expected > 1.0
    np.testing.assert_allclose(found["mismatched_kl"], np.full(4, expected), rtol=1e-4)
    loss_fn = make_preference_loss(MODEL, config)
    objective, sums = loss_fn(params, jax.tree.map(jnp.asarray, found), None)
    loss = float(objective) / float(sums["prompts"])
    assert loss == pytest.approx(mean_kto_loss(THUMBS, params, reference), rel=1e-4)


def test_good_and_bad_responses_have_weights_of_their_own():
    _, (metrics,) = prefer("kto", policy_seed=1, weights=(2.0, 0.5))
    expected = mean_kto_loss(FEEDBACK, params_of(MODEL, 1), params_of(MODEL, 0), 2.0, 0.5)
    assert metrics["train/loss"] == pytest.approx(expected, rel=2e-5)
    with pytest.raises(ValueError, match="undesirable_weight=0: must be positive"):
        PreferenceConfig("kto", undesirable_weight=0)


def test_prompts_are_paired_with_answers_to_other_prompts():
    rows, real = mismatched(jax.tree.map(jnp.asarray, batch_of()))
    said = []
    for row in range(len(real)):
        end = int(rows["segment_ids"][row].sum())
        said.append(np.asarray(rows["tokens"][row, :end]).tolist())
    pairs = [
        ("apple", "yes"), ("apple", "no"), ("apple", "yes"),
        ("bee", "x"), ("bee", "y"), None,
        ("cat", "long one"), ("cat", "s"), ("cat", "long one"),
        ("dog", "d"), ("dog", "ee"), None,
        ("apple", "f"), ("apple", "g"), None,  # not the other apple's
        ("eel", "aaa"), ("eel", "b"), None,
    ]  # fmt: skip
    assert real.tolist() == [pair is not None for pair in pairs]
    assert said == [[] if pair is None else spelled(*pair)[0] for pair in pairs]
    lengths = [0 if pair is None else len(pair[1]) + 1 for pair in pairs]
    assert rows["response_mask"].sum(axis=1).tolist() == lengths


def test_without_another_prompt_nothing_is_paired():
    batch = batch_of((FEEDBACK[0], FEEDBACK[4]))  # the same prompt
    _, real = mismatched(jax.tree.map(jnp.asarray, batch))
    assert not real.any()


# --- Reward models --------------------------------------------------------------------------


def score(params, asked, answer):
    """A reward model's score of a text alone, without padding: at its end token."""
    tokens, _ = spelled(asked, answer)
    return float(forward(REWARD)(params, np.array([tokens]))[0, -1])


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_the_reward_loss_is_bradley_and_terrys_over_all_pairs(eta):
    """With ties, Rao and Kupper's probabilities; a pair must differ by its prompt's margin."""
    params = params_of(REWARD, 0)
    losses, right = [], []
    for asked, answers, levels, margin in FEEDBACK:
        scores = [score(params, asked, answer) for answer in answers]
        terms, correct = [], []
        for i, j in itertools.permutations(range(len(scores)), 2):
            difference = scores[i] - scores[j]
            if levels[i] > levels[j]:
                terms.append(-log_sigmoid(difference - margin - eta))
                correct.append(difference > 0)
            elif eta and levels[i] == levels[j] and i < j:
                theta, a, b = np.exp(eta), np.exp(scores[i]), np.exp(scores[j])
                tie = (theta**2 - 1) * a * b / ((a + theta * b) * (b + theta * a))
                terms.append(-np.log(tie))
        losses.append(np.mean(terms))
        right.append(np.mean(correct))
    loss_fn = make_reward_loss(REWARD, tie_threshold=eta)
    _, (metrics,) = steps(REWARD, loss_fn, FEEDBACK, params)
    assert metrics["train/loss"] == pytest.approx(np.mean(losses), rel=2e-5)
    assert metrics["train/accuracy"] == pytest.approx(np.mean(right), rel=1e-6)
    assert metrics["train/prompts"] == 6


@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=pytest.mark.long), 0.3])
def test_reward_steps_are_the_same_in_parts(eta):
    loss_fn, params = make_reward_loss(REWARD, tie_threshold=eta), params_of(REWARD, 0)
    whole = steps(REWARD, loss_fn, FEEDBACK, params, count_steps=2)
    parts = steps(REWARD, loss_fn, FEEDBACK, params, count_steps=2, accumulate_steps=3)
    assert_same_steps(*whole, *parts)
