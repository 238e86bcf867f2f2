"""What one update is made of, through the shipped step: divergence, text beside it, controllers.

An Adam whose epsilon dwarfs the gradients moves parameters by the gradient itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import RlhfConfig
from llm.data.config import DataConfig, SourceConfig
from llm.models.config import AdapterConfig
from llm.rl.config import AlgorithmConfig, KLConfig, RewardConfig, RolloutConfig
from llm.training.config import TrainableConfig
from tests.rl.trainer import LINEAR, MODEL, PPO, ROLLOUT, Trainer, host, same

REINFORCE = AlgorithmConfig(name="reinforce", missing_eos_penalty=0.0)
PLAIN = dict(rate=1e6, epsilon=1e6, optimizer=dict(clip_norm=None))


def nothing(prompts, responses):
    return [0.0] * len(responses)


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def change(trainer, reward=nothing):
    """Return how a first step moves the policy: by its negative gradient, in one array."""
    trainer.reset()
    before = host(trainer.state.params["policy"])
    trainer.step(reward)
    return flat(jax.tree.map(np.subtract, host(trainer.state.params["policy"]), before))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def plain_log_probs(trainer, params, rollout):
    """Return log-probabilities of the responses' tokens out of whole logits."""
    logits = trainer.models.policy.apply(
        {"params": params},
        rollout.tokens,
        segment_ids=rollout.segment_ids,
        positions=rollout.positions,
    )
    logits = logits[:, :-1, : MODEL.vocab_size] / ROLLOUT.temperature
    chosen = rollout.tokens[:, 1:, None]
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
    return found[:, -rollout.mask.shape[1] :] * rollout.mask


@pytest.mark.parametrize(
    "place, parts",
    [
        ("loss_k2", 2),
        pytest.param("loss_k2", 1, marks=pytest.mark.long),
        pytest.param("loss_k3", 1, marks=pytest.mark.long),
    ],
)
def test_a_divergence_in_the_loss_is_divided_as_the_rewards_are(place, parts):
    beta = 20.0
    kl = KLConfig(coefficient=beta, place=place)
    trainer = Trainer(REINFORCE, kl, reference_seed=5, accumulate_steps=parts, **PLAIN)
    rollout = jax.tree.map(jnp.asarray, host(trainer.collect().rollout))
    reference = plain_log_probs(trainer, trainer.frozen["reference"], rollout)

    def objective(params):
        ours = plain_log_probs(trainer, params, rollout)
        ratio = jnp.exp(reference - ours)
        k3 = jnp.sum((ratio - 1.0 - (reference - ours)) * rollout.mask)
        k2 = 0.5 * jnp.sum(jnp.sum(ours - reference, axis=1) ** 2)
        return beta * (k2 if place == "loss_k2" else k3) / jnp.sum(rollout.mask)

    expected = -flat(host(jax.grad(objective)(host(trainer.state.params["policy"]))))
    assert error(change(trainer), expected) < 1e-3


@pytest.mark.parametrize(
    "aggregation", [pytest.param("token_mean", marks=pytest.mark.long), "sequence_sum"]
)
def test_k2_in_the_loss_costs_what_k1_in_the_reward_does(aggregation):
    """Response by response, while there is no baseline: β·k1·∇log π is the gradient of β·k1²/2."""
    algorithm = dataclasses.replace(REINFORCE, aggregation=aggregation)
    reward, loss = (
        change(Trainer(algorithm, kl, reference_seed=5, **PLAIN), lengths)
        for kl in (KLConfig(1.0), KLConfig(1.0, "loss_k2"))
    )
    assert error(loss, reward) < 1e-3


def test_text_beside_the_rewards_adds_its_gradient():
    random = np.random.default_rng(0)
    tokens = random.integers(0, MODEL.vocab_size, (4, 9)).astype(np.int32)
    ptx = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (random.random((4, 8)) < 0.7).astype(np.float32),
        "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
    }
    ptx = jax.tree.map(jnp.asarray, ptx)
    weighted = dataclasses.replace(REINFORCE, ptx_weight=3.0)
    kl = KLConfig(coefficient=0.0)
    options = dict(PLAIN, accumulate_steps=2)
    without, beside = Trainer(REINFORCE, kl, **options), Trainer(weighted, kl, ptx=ptx, **options)
    model, params = without.models.policy, host(without.state.params["policy"])

    def text_loss(params):
        logits = model.apply({"params": params}, ptx["tokens"])[..., : MODEL.vocab_size]
        chosen = ptx["targets"][..., None]
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
        return -3.0 * jnp.sum(found * ptx["loss_weights"]) / jnp.sum(ptx["loss_weights"])

    text = -flat(host(jax.grad(text_loss)(params)))
    assert error(change(beside), text) < 1e-3
    rewards, both = change(without, lengths), change(beside, lengths)
    assert error(both, text + rewards) < 1e-3
    assert error(both, text) > 0.1 and error(both, rewards) > 0.1


@pytest.mark.parametrize("name", ["rloo", pytest.param("grpo", marks=pytest.mark.long)])
def test_a_group_of_equal_scores_teaches_nothing_beside_another(name):
    """Whatever tokens such a group has, the update is the same."""
    algorithm = AlgorithmConfig(name=name, missing_eos_penalty=0.0)
    trainer, states = Trainer(algorithm, KLConfig(coefficient=0.0)), []
    for seed in (0, 1):
        trainer.reset()
        before, collected = host(trainer.state.params), trainer.collect()
        tokens = np.array(collected.rollout.tokens)
        tokens[:2, -6:] = np.random.default_rng(seed).integers(0, 200, (2, 6))
        collected = collected._replace(
            rollout=collected.rollout._replace(tokens=jnp.asarray(tokens)),
            scores=jnp.array([0.3, 0.3, 1.0, 0.0, 0.5, 2.0, 0.7, 0.7]),
        )
        trainer.learn_from(collected)
        states.append(host(trainer.state.params))
        assert not same(before, states[-1])
    assert same(*states)


def test_an_update_that_finds_too_much_divergence_is_not_made():
    """The first finds none, the second what the first has done."""
    often = dataclasses.replace(PPO, epochs=3, stop_kl=1e-5)
    stopped, once = (Trainer(x, rate=100.0, epsilon=LINEAR) for x in (often, PPO))
    metrics = stopped.step()
    assert metrics["rl/updates"] == 1 and metrics["rl/approx_kl"] == 0.0
    once.step()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        host(once.state.params),
        host(stopped.state.params),
    )
    loose = Trainer(dataclasses.replace(often, stop_kl=1e6), rate=100.0, epsilon=LINEAR)
    assert loose.step()["rl/updates"] == 3


def test_scores_are_scaled_and_the_coefficient_is_steered_from_step_to_step():
    algorithm = dataclasses.replace(REINFORCE, scale_scores=True)
    kl = KLConfig(coefficient=0.1, target_nats=0.5, horizon_responses=100)
    trainer = Trainer(algorithm, kl, reference_seed=5)
    seen, coefficient = [], 0.1
    for _ in range(3):
        collected = trainer.collect()
        seen.append(np.asarray(collected.scores))
        metrics = trainer.learn_from(collected)
        scaled = seen[-1].mean() / np.concatenate(seen).std()
        expected = scaled - coefficient * metrics["rl/kl"]
        assert metrics["rl/reward"] == pytest.approx(expected, rel=1e-4)
        assert metrics["rl/kl_coefficient"] == pytest.approx(coefficient, rel=1e-5)
        coefficient *= 1 + np.clip(metrics["rl/kl"] / 0.5 - 1, -0.2, 0.2) * 8 / 100
    assert float(trainer.state.controllers.kl_coefficient) == pytest.approx(coefficient, rel=1e-5)


def test_reinforce_takes_off_the_average_of_earlier_steps():
    trainer = Trainer(dataclasses.replace(REINFORCE, baseline_decay=0.75), KLConfig(0.0))
    baseline = 0.0
    for step in range(3):
        collected = trainer.collect()
        scores, tokens = np.asarray(collected.scores), np.asarray(collected.rollout.lengths)
        expected = -np.sum(tokens * (scores - baseline)) / np.sum(tokens)
        metrics = trainer.learn_from(collected)
        assert metrics["rl/policy_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        baseline = 0.75 * baseline + 0.25 * scores.mean() if step else scores.mean()
        assert float(trainer.state.controllers.baseline) == pytest.approx(baseline, rel=1e-5)


def test_penalties_count_where_groups_are_judged_and_where_they_are_learnt_from():
    algorithm = AlgorithmConfig(name="grpo", dynamic_draws=3, missing_eos_penalty=0.5)
    trainer, ended = Trainer(algorithm), jnp.array([True, False] * 4)
    sample = trainer.sample
    trainer.sample = lambda *args: sample(*args)._replace(finished=ended)
    for first, second, informative in ((1.0, 1.0, 1.0), (1.0, 1.5, 0.0)):
        trainer.reset()
        collected = trainer.collect(lambda p, r: [first, second] * 4)  # noqa: B023
        assert np.asarray(collected.scores).tolist() == [first, second - 0.5] * 4
        assert trainer.batches.cursor == (4 if informative else 16)
        assert trainer.learn_from(collected)["rl/informative_groups"] == informative


@pytest.mark.parametrize("pattern", ["*", "policy/head/*", "policy/layers/0/*"])
def test_what_a_shared_reference_stands_on_may_not_learn(pattern):
    with pytest.raises(
        ValueError, match="trainable.train lets the policy's .* with adapter.rank=2"
    ):
        Trainer(adapter=AdapterConfig(rank=2), trainable=TrainableConfig(train=(pattern,)))


def test_factors_may_be_named():
    trainable = TrainableConfig(train=("*/lora_?", "value/score/*"))
    Trainer(adapter=AdapterConfig(rank=2), trainable=trainable)


@pytest.mark.parametrize(
    "algorithm, kl, more, message",
    [
        (dict(name="rloo", whiten_advantages=True), {}, {}, "set whiten_advantages=False"),
        (dict(name="grpo", whiten_advantages=True), {}, {}, "set whiten_advantages=False"),
        (dict(whiten_advantages=True), dict(place="loss_k2"), {}, "'loss_k2' with .*whiten"),
        (dict(whiten_advantages=True), dict(place="loss_k3"), {}, "or kl.place='reward'"),
        (dict(aggregation="sequence_mean"), dict(place="loss_k2"), {}, "each response's length"),
        (dict(name="grpo", group_std=True), dict(place="loss_k2"), {}, "each group's deviation"),
        (
            dict(ptx_weight=1.0, minibatches=2),
            {},
            dict(accumulate_steps=2),
            "accumulate_steps=4; try 8",
        ),
    ],
)
def test_combinations_that_cannot_mean_what_they_say_are_refused(algorithm, kl, more, message):
    ptx = DataConfig(sources={"text": SourceConfig(paths=("x",))}, batch_sequences=6)
    with pytest.raises(ValueError, match=message):
        RlhfConfig(
            source="x",
            rewards={"r": RewardConfig(kind="arithmetic")},
            rollout=RolloutConfig(group=2),
            algorithm=AlgorithmConfig(**algorithm),
            kl=KLConfig(**kl),
            ptx=ptx,
            **more,
        )
