"""Plans of the stages after pretraining: their programs are those that run, and count as they do.

Compiled for fake CPU devices, whose attention is matrix products; tests/e2e/test_plan.py compiles
for TPUs.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from configs.schema import (
    DirectPreferenceConfig,
    FinetuneConfig,
    RewardModelConfig,
    RlhfConfig,
)
from experiments.assembly_preference import assemble_preference_training
from experiments.assembly_rlhf import assemble_rlhf
from experiments.plan_shapes import Passes, comparison_batch, device_bytes, kernel_flops
from experiments.plan_stages import model_shape, stage_of
from experiments.plan_step import compile_step
from llm.data.comparisons import ComparisonBatches, EncodedFeedback
from llm.data.config import ComparisonsConfig, DataConfig, SourceConfig
from llm.data.tokenizer_training import byte_tokenizer
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer, init_params, param_shapes
from llm.parallel.config import MeshConfig
from llm.parallel.hosts import place_batch
from llm.parallel.mesh import make_mesh
from llm.rl.config import AlgorithmConfig, RewardConfig, RolloutConfig
from llm.rl.models import Models
from llm.rl.prompts import Prompt
from llm.rl.rollout import make_rollout
from llm.scaling.accounting import count_flops, num_params
from llm.training.config import OptimizerConfig, PreferenceConfig, TrainableConfig
from llm.training.preference_loss import make_reference_step
from llm.training.trainable import make_rates

L, D, H, F, V = 3, 32, 4, 64, 384  # layers, width, heads of 8, features; a vocabulary of 3 · 128
SHAPE = TransformerConfig(
    vocab_size=V, width=D, num_layers=L, num_heads=H, num_kv_heads=H, head_dim=8, mlp_width=F,
    max_length_tokens=64, tied_head=False,
)  # fmt: skip
# A layer's kernels: queries, keys, values, output; two or three of the feed-forward block.
KERNELS = L * (4 * D * D + (3 if SHAPE.gated else 2) * D * F)
B, T = 8, 16
TEXT = DataConfig(
    sources={"text": SourceConfig(paths=("README.md",))}, length_tokens=T, batch_sequences=B
)
COMPARISONS = ComparisonsConfig(length_tokens=T, batch_prompts=4, max_responses=2)
ROLLOUT = RolloutConfig(prompts=4, group=2, prompt_tokens=12, response_tokens=4)
PPO = AlgorithmConfig(name="ppo", epochs=3, minibatches=2)
RULE = {"rule": RewardConfig(kind="pattern", path=".*")}
COMMON = dict(source="x", mesh=MeshConfig(data=1, fsdp=4), optimizer=OptimizerConfig(name="adamw"))
NORMS = (2 * L + 1) * D
WEIGHTS = 4 * ((num_params(SHAPE) - NORMS) / 4 + NORMS)  # bytes of one of four devices, fsdp
ALL_SEEN = 4 * L * T * D  # FLOPs a token of scores and weighted values, masked ones too


def finetune(**fields):
    return FinetuneConfig(data=TEXT, total_steps=20, **COMMON | fields)


def reward(**fields):
    return RewardModelConfig(comparisons=COMPARISONS, total_epochs=1.0, **COMMON | fields)


def preference(**fields):
    return DirectPreferenceConfig(comparisons=COMPARISONS, total_steps=20, **COMMON | fields)


def rlhf(**fields):
    given = dict(rewards=RULE, rollout=ROLLOUT, algorithm=PPO)
    return RlhfConfig(**COMMON | given | fields)


def planned(config):
    return stage_of(config, SHAPE, jax.devices()[:4])


def flops(program, stage):
    found = compile_step(program.lower(), stage.mesh, program.open_turns)
    return 4 * found.product_flops


@pytest.mark.parametrize(("config", "head"), [(finetune(), V), (reward(), 1), (preference(), V)])
def test_an_update_multiplies_each_parameter_three_times(config, head):
    """Forward, towards inputs, towards weights: 6 FLOPs a parameter and token."""
    stage = planned(config)
    update = stage.programs[-1]
    assert update.name == "update"
    expected = stage.tokens * (6 * (KERNELS + D * head) + 3 * ALL_SEEN)
    assert flops(update, stage) == pytest.approx(expected, rel=2e-3)


def test_low_rank_factors_spare_what_is_frozen_its_gradient():
    rank = 4
    # Rolled: the first layer does as all do, though nothing below it learns.
    rolled = dict(compute=ComputeConfig(unroll_layers=False))
    adapter = AdapterConfig(rank=rank, targets=("query", "value"))
    stage = planned(finetune(adapter=adapter, **rolled))
    factors = L * 2 * (D * rank + rank * D)
    # Frozen: forward and towards inputs. The factors' products: all three.
    expected = 4 * (KERNELS + D * V) + 6 * factors + 3 * ALL_SEEN
    (update,) = stage.programs
    assert flops(update, stage) == pytest.approx(stage.tokens * expected, rel=2e-3)
    # Of each pair fsdp cuts the factor that reads the stream; two moments, and a count.
    held = 4 * factors / 2 * (1 / 4 + 1)
    assert stage.resident["parameters"] == WEIGHTS + held
    assert stage.resident["optimizer"] == 2 * held + 4
    full = planned(finetune())
    assert full.resident["optimizer"] == pytest.approx(2 * full.resident["parameters"], rel=1e-3)
    assert update.moved < 0.5 * full.programs[0].moved


def test_a_reference_looks_once_and_lies_beside_the_update():
    stage = planned(preference())
    reference, update = stage.programs
    expected = stage.tokens * count_flops(SHAPE, T, causal_half=False).forward()
    assert flops(reference, stage) == pytest.approx(expected, rel=2e-3)
    assert update.beside == WEIGHTS
    # While it looks, the policy and its two moments lie there.
    assert reference.beside == pytest.approx(3 * WEIGHTS, rel=1e-3)
    kto = planned(preference(preference=PreferenceConfig(method="kto")))
    assert flops(kto.programs[0], kto) == pytest.approx(3 * expected, rel=2e-3)
    simpo = planned(preference(preference=PreferenceConfig(method="simpo")))
    assert [program.name for program in simpo.programs] == ["update"]
    assert kto.programs[0].beside == pytest.approx(2 * WEIGHTS, rel=1e-3)  # the policy it reads
    shared = planned(preference(adapter=AdapterConfig(rank=2)))
    assert "reference" not in shared.resident and shared.programs[-1].beside == 0
    assert shared.programs[0].beside > shared.resident["optimizer"]  # and the policy's factors
    adapter = AdapterConfig(rank=2, targets=("query",))
    both = planned(preference(adapter=adapter, preference=PreferenceConfig(method="kto")))
    assert both.programs[0].beside == both.resident["optimizer"]
    factors = 2 * L * 2 * (D + D) * stage.tokens  # which the policy alone goes through
    assert flops(both.programs[0], both) == pytest.approx(3 * expected + factors, rel=2e-3)


def test_policy_gradients_sample_look_and_learn():
    stage = planned(rlhf())
    rollout, learn = stage.programs
    prompts, responses, width, length = 4, 8, 12, 12 + 4
    layers = 2 * KERNELS + ALL_SEEN  # forward; a token that is decoded sees a cache of T
    reading = 2 * KERNELS + 4 * L * width * D
    head = 2 * D * V
    # The prompt once, whose last position alone has logits, for its group; then three more tokens.
    expected = prompts * (width * reading + head) + responses * 3 * (layers + head)
    assert flops(rollout, stage) == pytest.approx(expected, rel=2e-3)
    # Policy, reference and value look; in three epochs policy and value learn. Logits are made of
    # the response's tokens alone.
    passes = 3 + 3 * 2 * 3
    expected = responses * (length * passes * layers + 4 * head * (2 + 3 * 3))
    assert flops(learn, stage) == pytest.approx(expected, rel=2e-3)
    score = D + 4  # bytes of a device: a kernel that is cut, a bias that is not
    assert stage.resident["parameters"] == 2 * WEIGHTS - 4 * D * V / 4 + score
    assert stage.resident["reference"] == WEIGHTS
    assert rollout.beside == sum(stage.resident.values()) - WEIGHTS


def test_a_reward_model_lies_over_a_process_and_scores_what_was_sampled():
    model = {"judge": RewardConfig(kind="model", path="runs/not_trained", batch_responses=3)}
    stage = planned(rlhf(rewards=model))
    _, score, learn = stage.programs
    assert score.name == "reward judge" and score.lower is None
    trunk = num_params(SHAPE) - D * V + D + 1  # a score in place of the vocabulary
    assert stage.resident["reward models"] == learn.beside == 4 * trunk / 4  # four devices
    layers = 2 * KERNELS + 4 * L * 8 * D  # of 16 positions each sees half
    assert score.products == pytest.approx(9 * 16 * layers, rel=1e-3)  # 8 responses, in threes
    (note,) = stage.notes
    assert "runs/not_trained is not there" in note


def test_sampling_reads_what_multiplies_and_the_cache_for_each_token():
    """In the smaller of the types that weights are kept and computed in; a table's rows are looked
    up."""
    config = rlhf(mesh=MeshConfig(data=1, fsdp=2, tensor=2),
                  compute=ComputeConfig(dtype="bfloat16", unroll_layers=False))  # fmt: skip
    rollout = planned(config).programs[0]
    cache = 8 / 2 * T * L * 2 * (H / 2) * 8  # of half the responses, half the heads
    read = (KERNELS + D * V) / 2 + NORMS + cache
    assert rollout.moved == pytest.approx(4 * 2 * read, rel=1e-3)


def test_kernels_are_counted_where_the_models_choose_them():
    long = dataclasses.replace(SHAPE, max_length_tokens=256)
    compute = ComputeConfig()
    scores = 4 * L * 128 * D
    forward = Passes(10, 128, backward=False)
    assert kernel_flops(long, compute, None, forward) == 10 * scores
    # Splash: two products forward, seven backward
    assert kernel_flops(long, compute, None, Passes(10, 128)) == 10 * scores * (1 + 3.5)
    for shape, length in ((long, 72), (dataclasses.replace(long, positions="alibi"), 128)):
        assert kernel_flops(shape, compute, None, Passes(10, length)) == 0
    experts = dict(num_experts=4, experts_per_token=2, expert_mlp_width=F)
    sparse = dataclasses.replace(SHAPE, cycle_layers=("global_moe",), **experts)
    one = L * 2 * 2 * 3 * D * F  # two experts of three kernels
    learn = make_rates(TrainableConfig(), sparse, param_shapes(Transformer(sparse)))
    frozen = make_rates(
        TrainableConfig(train=("*attention*",)), sparse, param_shapes(Transformer(sparse))
    )
    assert kernel_flops(sparse, compute, learn, Passes(10, T, backward=False)) == 10 * one
    assert kernel_flops(sparse, compute, learn, Passes(10, T)) == 30 * one
    assert kernel_flops(sparse, compute, frozen, Passes(10, T)) == 20 * one
    capacity = dataclasses.replace(sparse, expert_capacity_factor=1.0)
    assert kernel_flops(capacity, compute, learn, Passes(10, T)) == 0


# ------------------------------------------------------------------- what is planned, runs


def test_the_planned_programs_take_what_a_run_gives_them():
    """Compiled ones take arrays of exactly their shapes, types and places, or raise."""
    tokenizer = byte_tokenizer()
    shape = dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size)
    config = rlhf()
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    training = assemble_rlhf(config, shape, mesh)
    stage = stage_of(config, shape, jax.devices()[:4])
    learn = stage.programs[-1].lower().compile()
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "policy": init_params(Transformer(shape), keys[0]),
        "value": init_params(ScalarModel(shape, ComputeConfig()), keys[1]),
    }
    with jax.set_mesh(mesh):
        state = training.init_state(mesh, 0, params=params, kl_coefficient=0.1)
        lies = jax.tree.map(lambda x: x.sharding, state.params["policy"])
        frozen = {"reference": jax.device_put(params["policy"], lies)}
        prompts = [Prompt((), tuple(range(3 + i)), {}, f"test:{i}") for i in range(4)]
        rollout = make_rollout(training.models.policy, ROLLOUT, tokenizer, mesh)(
            state.params["policy"], prompts, jax.random.key(1)
        )
        scores = place_batch({"scores": np.arange(8, dtype=np.float32)}, mesh)["scores"]
        cursor = jax.device_put(np.uint32(4), jax.NamedSharding(mesh, jax.P()))
        state, metrics = learn(state, frozen, rollout, scores, cursor, None)
    assert int(state.step) == 1 and np.isfinite(float(metrics["train/loss"]))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_planned_comparisons_are_those_of_a_run(method):
    config = preference(preference=PreferenceConfig(method=method))
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    training = assemble_preference_training(config, SHAPE, mesh, 20)
    rows = tuple(np.arange(n, dtype=np.int32) for n in (9, 12))
    records = [EncodedFeedback(rows, (3, 3), (1.0, 0.0), 1.0, f"test:{i}") for i in range(5)]
    batch = next(ComparisonBatches(records, config.comparisons))
    shapes = comparison_batch(config.comparisons, mesh)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in shapes.items()
    }
    models = Models(training.model, None)
    look = make_reference_step(training.model, models.reference, mesh, config.preference)
    update = planned(config).programs[-1].lower().compile()
    with jax.set_mesh(mesh):
        state = training.init_state(mesh, 0)
        batch = look(state.params, state.params, batch)
        state, metrics = update(state, place_batch(batch, mesh))
    assert int(state.step) == 1 and np.isfinite(float(metrics["train/loss"]))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 8 does not divide over the 3 devices"):
        stage_of(finetune(mesh=MeshConfig(data=3)), SHAPE, jax.devices()[:3])


def test_the_shape_comes_from_a_recipe_a_workdir_or_a_hugging_face_directory(tmp_path):
    assert num_params(model_shape("configs/gpt2_124m.py")) == 124_439_808  # Radford et al. 2019
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    run.mkdir(), theirs.mkdir()
    fields = {"model": dataclasses.asdict(SHAPE)}
    (run / "config.json").write_text(json.dumps(fields))
    assert model_shape(str(run)) == SHAPE
    (run / "config.json").write_text(json.dumps(fields | {"calibration_bins": 10}))
    with pytest.raises(ValueError, match="holds a reward model"):
        model_shape(str(run))
    shape = dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H,
                 intermediate_size=F)  # fmt: skip
    config = transformers.LlamaConfig(**shape, max_position_embeddings=64)
    config.save_pretrained(theirs)
    found = model_shape(str(theirs))
    assert (found.width, found.num_layers, found.mlp_width, found.vocab_size) == (D, L, F, V)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_shape(str(tmp_path / "nothing"))


def test_device_bytes_are_those_of_one_device():
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    batch = place_batch({"rows": np.zeros((8, 3), np.float32)}, mesh)
    assert device_bytes(batch) == 2 * 3 * 4
    assert device_bytes(jnp.zeros((5,), jnp.int8)) == 5
