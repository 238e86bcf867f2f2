"""The estimators' expectations against the exact gradient of E[r] − β·KL(π‖π_ref), enumerated.

All responses of a small transformer are listed, each weighted by its probability: what the shipped
experience and loss make of them is the expectation itself. Right ones agree in direction and size;
each known mistake fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer, init_params
from llm.objectives.policy_gradient import kl_k1, kl_k2_sequence, kl_k3
from llm.rl.config import AlgorithmConfig, KLConfig
from llm.rl.forward import Forward
from llm.rl.models import Models
from llm.rl.rollout import Rollout
from tests.rl.enumeration import expected_loss
from tests.rl.tabular import (
    ALL,
    EOS,
    LENGTH,
    VOCAB,
    probabilities,
    random_logits,
    random_rewards,
)
from tests.rl.tabular import token_log_probs as log_probs_of

BETA = 0.25  # a binary fraction: controllers are float32
PROMPT = (1, 2)
MODEL = TransformerConfig(
    vocab_size=VOCAB,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=12,
    max_length_tokens=8,
)
COMPUTE = ComputeConfig(dtype="float64")
MODELS = Models(Transformer(MODEL, COMPUTE), ScalarModel(MODEL, COMPUTE))
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_params(model, seed):
    """Return parameters large enough for the policy to be far from uniform, the head's too."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.7, x.shape)), shapes)


def setting():
    """Return parameters of policy and reference, and a reward a response."""
    policy, reference = (random_params(MODELS.policy, seed) for seed in (0, 1))
    return policy, reference, random_rewards(2)


def plain_log_probs(params, temperature):
    """Return the log-probability of every response out of whole logits, without any padding."""
    prompts = np.tile(PROMPT, (len(ALL.tokens), 1))
    tokens = jnp.asarray(np.concatenate([prompts, ALL.tokens], axis=1))
    logits = MODELS.policy.apply({"params": params}, tokens)[:, len(PROMPT) - 1 : -1, :VOCAB]
    found = jax.nn.log_softmax(logits / temperature)
    chosen = jnp.take_along_axis(found, ALL.tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(chosen * ALL.mask, axis=1)


@functools.cache
def exact(temperature):
    """Return the gradient of the loss −(E[r] − β·KL), by differentiating the enumerated sum."""
    policy, reference, rewards = setting()
    theirs = plain_log_probs(reference, temperature)

    def loss(params):
        ours = plain_log_probs(params, temperature)
        return -jnp.sum(jnp.exp(ours) * (rewards - BETA * (ours - theirs)))

    total = jnp.sum(jnp.exp(plain_log_probs(policy, temperature)))
    assert float(total) == pytest.approx(1.0, abs=1e-12)
    return ravel_pytree(jax.jit(jax.grad(loss))(policy))[0]


def all_responses():
    """Return every response as sampling leaves it: after the prompt, padded on both sides."""
    count, width = len(ALL.tokens), 1 + len(PROMPT)
    prompts = np.tile((EOS, *PROMPT), (count, 1))
    real = np.concatenate([np.tile((0, 1, 1), (count, 1)), ALL.mask], axis=1)
    return Rollout(
        tokens=jnp.asarray(np.concatenate([prompts, ALL.tokens], axis=1)),
        segment_ids=jnp.asarray(real, jnp.int32),
        positions=jnp.tile(jnp.maximum(jnp.arange(width + LENGTH) - 1, 0), (count, 1)),
        mask=jnp.asarray(ALL.mask),
        sampler_log_probs=jnp.zeros_like(ALL.mask),
        lengths=jnp.asarray(ALL.mask.sum(axis=1), jnp.int32),
        finished=jnp.ones(count, bool),
    )


def shipped(
    name, *, place="reward", mode="sequence_sum", temperature=1.0, learnt_temperature=None, **wrong
):
    """Return the expected gradient of the shipped loss, at another temperature where asked."""
    policy, reference, rewards = setting()
    value = random_params(MODELS.value, 3)
    forward = Forward(MODELS, learnt_temperature or temperature, tile_tokens=16)
    algorithm = AlgorithmConfig(name=name, aggregation=mode, lam=1.0)
    kl = KLConfig(BETA, place)
    probs = jnp.exp(plain_log_probs(policy, temperature))
    rollout = all_responses()

    def loss(params):
        said = forward({"policy": params, "value": value}, rollout)
        theirs = forward.reference({}, {"reference": reference}, rollout)
        return expected_loss(said, theirs, rewards, probs, algorithm, kl, **wrong)

    return ravel_pytree(jax.jit(jax.grad(loss))(policy))[0]


def relative_error(found, exact):
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.long), 0.7])
@pytest.mark.parametrize(
    "name, place",
    [
        ("ppo", "reward"),
        ("reinforce", "reward"),
        ("rloo", "reward"),
        ("reinforce", "loss_k2"),
        ("rloo", "loss_k2"),
    ],
)
def test_the_expected_update_is_the_exact_gradient(name, place, temperature):
    """Whatever the baseline: a value of the prefix, a constant, the other response's score."""
    found = shipped(name, place=place, temperature=temperature)
    assert relative_error(found, exact(temperature)) < 1e-8


WITHOUT_EOS = ALL.mask * (ALL.tokens != EOS)


@pytest.mark.parametrize(
    "name", ["ppo", *(pytest.param(name, marks=pytest.mark.long) for name in ("reinforce", "rloo"))]
)
@pytest.mark.parametrize(
    "mistake",
    [
        dict(coefficient=-BETA),
        dict(mode="sequence_mean"),
        dict(learnt=WITHOUT_EOS),
        dict(temperature=0.7, learnt_temperature=1.0),
    ],
    ids=["KL sign", "length mean", "EOS masked", "temperature missing"],
)
def test_known_mistakes_are_not_the_gradient(name, mistake):
    assert relative_error(shipped(name, **mistake), exact(mistake.get("temperature", 1.0))) > 0.05


def test_a_mean_with_the_sample_in_it_is_short_by_one_in_g():
    found = shipped("grpo")
    assert relative_error(found, (1 - 1 / 2) * exact(1.0)) < 1e-8
    assert relative_error(found, exact(1.0)) > 0.4  # so a leave-one-out with itself would be found


def test_k2_of_the_sequence_has_the_gradient_of_the_divergence_and_others_have_not():
    logits, reference = random_logits(0), random_logits(1)
    p, mask = probabilities(logits), jnp.asarray(ALL.mask)
    theirs = log_probs_of(reference)

    def divergence(logits):
        ours, theirs = (jnp.sum(log_probs_of(x), axis=1) for x in (logits, reference))
        return jnp.sum(jnp.exp(ours) * (ours - theirs))

    exact = jax.grad(divergence)(logits)

    def expected(per_response):
        return jax.grad(lambda x: jnp.sum(p * per_response(log_probs_of(x))))(logits)

    k2 = expected(lambda log_probs: kl_k2_sequence(log_probs, theirs, mask))
    assert relative_error(k2, exact) < 1e-10
    k1 = expected(lambda log_probs: jnp.sum(kl_k1(log_probs, theirs) * mask, axis=1))
    assert float(jnp.linalg.norm(k1)) < 1e-10  # no effect at all
    k3 = expected(lambda log_probs: jnp.sum(kl_k3(log_probs, theirs) * mask, axis=1))
    assert relative_error(k3, exact) > 0.05
    k2_a_token = expected(
        lambda log_probs: jnp.sum(0.5 * jnp.square(log_probs - theirs) * mask, axis=1)
    )
    assert relative_error(k2_a_token, exact) > 0.05


def test_divergence_estimators_are_unbiased():
    logits, reference = random_logits(0), random_logits(1)
    p, q = probabilities(logits), probabilities(reference)
    ours, theirs = log_probs_of(logits), log_probs_of(reference)
    exact = float(jnp.sum(p * (jnp.log(p) - jnp.log(q))))
    for estimator in (kl_k1, kl_k3):
        mean = float(jnp.sum(p[:, None] * estimator(ours, theirs) * ALL.mask))
        assert mean == pytest.approx(exact, rel=1e-10)
    assert float(jnp.min(kl_k3(ours, theirs))) >= 0 > float(jnp.min(kl_k1(ours, theirs)))
