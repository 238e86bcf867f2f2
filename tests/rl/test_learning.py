"""A step's sampling and learning on a small transformer: what must hold whatever is rewarded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.config import AdapterConfig, ComputeConfig
from llm.models.transformer import Transformer
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.rl.config import AlgorithmConfig, KLConfig
from llm.rl.forward import response_log_probs
from llm.rl.rollout import SamplerMismatchError, check_gap
from tests.rl.trainer import LINEAR, MODEL, PPO, ROLLOUT, Trainer, at, host, same


def test_the_first_update_is_on_policy_to_the_bit():
    metrics = Trainer().step()
    assert metrics["rl/ratio"] == 1.0
    assert metrics["rl/clip_fraction"] == 0.0 and metrics["rl/approx_kl"] == 0.0
    assert metrics["rl/kl"] == 0.0  # the reference is where it started
    several = dataclasses.replace(PPO, epochs=2, minibatches=2)
    metrics = Trainer(several).step()
    assert metrics["rl/updates"] == 4 and metrics["rl/approx_kl"] > 0
    # While nothing is learnt, later updates compare what was looked up with what they compute.
    still = Trainer(several, rate=1e-30).step()
    assert still["rl/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert abs(still["rl/approx_kl"]) < 1e-7 and still["rl/clip_fraction"] == 0.0


@pytest.mark.parametrize(
    "group", [pytest.param(1, marks=pytest.mark.long), ROLLOUT.group]
)  # prompts read for each row, or once
def test_trainer_and_sampler_agree_at_a_temperature(group):
    trainer = Trainer()
    collected = trainer.collect()
    assert trainer.step()["rl/log_prob_gap"] < 1e-5
    rollout = host(collected.rollout)
    params = host(trainer.state.params["policy"])
    found, entropies = response_log_probs(
        trainer.models.policy,
        params,
        collected.rollout,
        temperature=0.7,
        tile_tokens=16,
        group=group,
    )
    for row in range(8):
        tokens = rollout.tokens[row][rollout.segment_ids[row] > 0]
        length = int(rollout.lengths[row])
        logits = trainer.models.policy.apply({"params": params}, jnp.asarray(tokens[None]))[0]
        scaled = np.asarray(logits, np.float64)[:, : MODEL.vocab_size] / 0.7
        scaled -= np.log(np.sum(np.exp(scaled), axis=-1, keepdims=True))
        for t in range(length):
            place = len(tokens) - length + t - 1
            assert float(found[row, t]) == pytest.approx(scaled[place, tokens[place + 1]], abs=2e-4)
            entropy = -np.sum(np.exp(scaled[place]) * scaled[place])
            assert float(entropies[row, t]) == pytest.approx(entropy, abs=2e-4)
    with pytest.raises(SamplerMismatchError, match="step 3: .*0.2 nats a token, more than"):
        check_gap(0.2, 3, ROLLOUT)
    with pytest.raises(SamplerMismatchError):
        check_gap(float("nan"), 3, ROLLOUT)


@pytest.mark.parametrize(
    "remat, adapter",
    [
        ("none", AdapterConfig()),
        ("full", AdapterConfig(rank=2)),
        pytest.param("full", AdapterConfig(), marks=pytest.mark.long),
        pytest.param("none", AdapterConfig(rank=2), marks=pytest.mark.long),
    ],
)
def test_a_prompt_read_once_for_its_group_has_the_gradient_of_whole_rows(remat, adapter):
    trainer = Trainer(AlgorithmConfig(name="grpo"), adapter=adapter)
    rollout = host(trainer.collect().rollout)
    lengths = np.array([6, 2, 1, 6, 3, 5, 4, 4])  # padding on both sides
    mask = np.arange(6) < lengths[:, None]
    segments = np.concatenate([rollout.segment_ids[:, :-6], mask], axis=1).astype(np.int32)
    assert not segments[:, 0].all()
    rollout = rollout._replace(mask=mask.astype(np.float32), segment_ids=segments, lengths=lengths)
    rollout = jax.tree.map(jnp.asarray, rollout)
    with jax.enable_x64(True):
        compute = ComputeConfig(dtype="float64", remat=remat)
        model = Transformer(MODEL, compute, adapter)
        params = jax.tree.map(
            lambda x: np.asarray(x, np.float64) + 0.01, host(trainer.state.params["policy"])
        )

        def objective(params, group):
            found, entropies = response_log_probs(
                model, params, rollout, temperature=0.7, group=group
            )
            return jnp.sum(jnp.sin(found) + 0.1 * entropies)

        rows, groups = (
            jax.jit(jax.value_and_grad(objective), static_argnums=1)(params, group)
            for group in (1, ROLLOUT.group)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), rows, groups
        )


@pytest.mark.parametrize(
    "name, minibatches",
    [("ppo", 2), *(pytest.param(*x, marks=pytest.mark.long) for x in (("rloo", 2), ("grpo", 1)))],
)
def test_gradient_accumulation_changes_nothing(name, minibatches):
    # With one minibatch, in one part, the pass that looks is the one that is learnt from.
    algorithm = dataclasses.replace(PPO, name=name, minibatches=minibatches)
    states = []
    for parts in (1, 2, 4):
        trainer = Trainer(algorithm, rate=1.0, epsilon=LINEAR, accumulate_steps=parts)
        trainer.step()
        states.append(host(trainer.state.params))
    for other in states[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), states[0], other
        )


@pytest.mark.parametrize("name", [pytest.param("rloo", marks=pytest.mark.long), "grpo"])
def test_equal_rewards_teach_nothing(name):
    algorithm = AlgorithmConfig(name=name, missing_eos_penalty=0.0, group_std=name == "grpo")
    trainer = Trainer(algorithm, kl=KLConfig(coefficient=0.0))
    before = host(trainer.state.params)
    metrics = trainer.step(lambda prompts, responses: [0.3] * len(responses))
    assert same(before, trainer.state.params)
    assert metrics["train/grad_norm"] == 0.0 and metrics["train/skipped_in_a_row"] == 0


@pytest.mark.parametrize(
    "name, minibatches", [pytest.param("adamw", 1, marks=pytest.mark.long), ("muon", 2)]
)
def test_a_batch_that_is_all_masked_leaves_the_parameters(name, minibatches):
    """And the optimizer, whose momentum and decay would move on by themselves."""
    algorithm = AlgorithmConfig(
        name="grpo", dynamic_draws=0, entropy_weight=0.1, missing_eos_penalty=0.0,
        minibatches=minibatches,
    )  # fmt: skip
    kl = KLConfig(coefficient=0.1, place="loss_k2")
    trainer = Trainer(algorithm, kl=kl, optimizer=dict(name=name, weight_decay=0.1))
    start = host(trainer.state.params)
    assert trainer.step()["rl/updates"] == minibatches
    before = host(trainer.state)
    assert not same(start, before.params)
    metrics = trainer.step(lambda prompts, responses: [1.0] * len(responses))
    assert metrics["rl/informative_groups"] == 0.0 and metrics["rl/updates"] == 0
    assert metrics["train/skipped_in_a_row"] == 0
    assert same(before.params, trainer.state.params)
    assert same(before.opt_state, trainer.state.opt_state)


def test_further_draws_fill_groups_that_teach_nothing():
    algorithm = AlgorithmConfig(name="grpo", dynamic_draws=3, missing_eos_penalty=0.0)
    trainer = Trainer(algorithm)

    def only_long_prompts(prompts, responses):
        return [hash_of(r) if len(p.text) > 2 else 0.0 for p, r in zip(prompts, responses)]  # noqa: B905

    def hash_of(text):
        return float(sum(map(ord, text)) % 97)

    drawn = trainer.collect(only_long_prompts)
    groups = np.asarray(drawn.scores).reshape(4, 2)
    assert (groups[:, 0] != groups[:, 1]).sum() == 4
    assert all(len(p.text) > 2 for p in drawn.prompts)
    assert trainer.batches.cursor in (8, 12, 16)
    # Texts, prompts and scores still belong together.
    assert only_long_prompts(drawn.prompts, drawn.texts) == np.asarray(drawn.scores).tolist()


def test_policy_value_and_reference_share_a_trunk_under_an_adapter():
    adapter = AdapterConfig(rank=2, quantize="int8")
    trainer = Trainer(adapter=adapter)
    assert trainer.frozen == {}
    names = {
        p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(trainer.state.params["value"])
    }
    assert names == {"lora_a", "lora_b", "kernel", "bias"}  # the last two of its head
    before = host(trainer.state.params)
    first = trainer.step()
    assert first["rl/kl"] == 0.0 and first["rl/log_prob_gap"] < 1e-4
    for _ in range(3):
        last = trainer.step()
    assert last["rl/kl"] != 0.0
    after = host(trainer.state.params)
    for path, x in jax.tree_util.tree_leaves_with_path(before["policy"]):
        moved = not np.array_equal(x, at(after["policy"], path))
        assert moved == path[-1].key.startswith("lora_"), path
    assert not same(before["value"], after["value"])


def test_a_step_is_a_function_of_its_state_and_compiles_once(caplog):
    def compiled():
        names = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
        caplog.clear()
        return [name.split("XLA compilation of ")[1].split(" in ")[0] for name in names]

    one, other = Trainer(), Trainer()
    for trainer in (one, other):
        with jax.log_compiles():
            trainer.step()
            assert {"jit(sample)", "jit(learn)"} <= set(compiled())
            for _ in range(2):
                trainer.step()
            assert compiled() == []
    assert same(one.state, other.state)


@pytest.mark.long
def test_meshes_agree():
    """In sampling too; learning alone, to the last bits: tests/parallel/test_meshes.py."""
    algorithm = dataclasses.replace(PPO, minibatches=2)
    single = Trainer(algorithm, rate=1.0, epsilon=LINEAR)
    first = single.step()
    for sizes in (
        dict(data=4),
        dict(data=1, fsdp=2, tensor=2),
        dict(data=2, context=2),
        dict(data=2, pipeline=2),
    ):
        count = int(np.prod(list(sizes.values())))
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:count])
        trainer = Trainer(algorithm, mesh=mesh, rate=1.0, epsilon=LINEAR)
        metrics = trainer.step()
        assert metrics["rl/score"] == pytest.approx(first["rl/score"], rel=1e-5)
        assert metrics["rl/policy_loss"] == pytest.approx(first["rl/policy_loss"], abs=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            host(single.state.params),
            host(trainer.state.params),
        )


def test_learning_finds_the_reward():
    trainer = Trainer(dataclasses.replace(PPO, whiten_advantages=True), rate=3e-2)

    def letters(prompts, responses):
        return [float(sum(map(str.isalpha, response))) for response in responses]

    scores = [trainer.step(letters)["rl/score"] for _ in range(25)]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 1.0
