"""The programs of a step of the stages after pretraining, which `experiments.plan` compiles."""

import dataclasses
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from configs.command_line import load_config
from configs.schema import (
    DirectPreferenceConfig,
    FinetuneConfig,
    PretrainConfig,
    RewardModelConfig,
    RlhfConfig,
    SpeedrunConfig,
)
from experiments.assembly import Training, assemble_finetuning
from experiments.assembly_preference import assemble_preference_training
from experiments.assembly_reward import assemble_reward_training
from experiments.loading import (
    check_writes,
    is_workdir,
    load_model,
    load_model_config,
    read_config,
)
from experiments.plan_rlhf import plan_rlhf
from experiments.plan_shapes import (
    Passes,
    Stage,
    StageProgram,
    comparison_batch,
    device_bytes,
    frozen_models,
    kernel_flops,
    num_score_params,
    reference_bytes,
    resident_bytes,
    updated_bytes,
)
from experiments.plan_step import state_of
from llm.data.disk import read_json_object
from llm.interop.families import config_from_huggingface
from llm.models.config import TransformerConfig
from llm.models.on_mesh import check_on_mesh
from llm.parallel.hosts import check_batch
from llm.parallel.mesh import make_mesh
from llm.rl.models import Models
from llm.scaling.accounting import num_params
from llm.training.ahead import abstract_batch
from llm.training.files import absolute
from llm.training.preference_loss import ReferenceStep, make_reference_step
from llm.training.state import TrainState

StageConfig = FinetuneConfig | RewardModelConfig | DirectPreferenceConfig | RlhfConfig
SOME_STEPS = 10**9  # where their number is not known: the programs are the same


def model_shape(source: str) -> TransformerConfig:
    """Return the shape of a source's model, whose weights are not read, or of a recipe's.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: what is there has no model.
    """
    if re.search(r"\.py(:|$)", source):
        config = load_config(source, [], (PretrainConfig, SpeedrunConfig))
        return (config.pretrain if isinstance(config, SpeedrunConfig) else config).model
    path = absolute(source)
    if is_workdir(path):
        check_writes(source, read_config(path))
        return load_model_config(path)
    if (path / "config.json").exists():
        return config_from_huggingface(read_json_object(path / "config.json"))
    return load_model(source).config


def stage_of(config: StageConfig, shape: TransformerConfig, devices: Sequence[jax.Device]) -> Stage:
    """Return the programs of a stage whose model has that shape.

    Raises:
      ValueError: the model, or the batch, cannot run on the config's mesh.
    """
    shape = dataclasses.replace(shape, dropout_rate=getattr(config, "dropout_rate", 0.0))
    mesh = make_mesh(config.mesh, devices)
    check_on_mesh(shape, config.compute, mesh)
    plan = {
        FinetuneConfig: _plan_finetuning,
        RewardModelConfig: _plan_reward,
        DirectPreferenceConfig: _plan_preference,
        RlhfConfig: plan_rlhf,
    }
    return plan[type(config)](config, shape, mesh)


def _plan_finetuning(config: FinetuneConfig, shape: TransformerConfig, mesh: Mesh) -> Stage:
    steps = config.num_steps(0) if config.total_epochs is None else None  # of packed rows
    training = assemble_finetuning(config, shape, mesh, steps or SOME_STEPS)
    state = state_of(training, mesh)
    batch = abstract_batch(mesh, config.data.batch_sequences, config.data.length_tokens)
    check_batch(batch, mesh)
    tokens = config.tokens_per_step
    update = _update(config, training, state, batch, Passes(tokens, config.data.length_tokens))
    return Stage(mesh, num_params(shape), resident_bytes(state), [update], tokens, steps)


def _plan_reward(config: RewardModelConfig, shape: TransformerConfig, mesh: Mesh) -> Stage:
    training = assemble_reward_training(config, shape, mesh, config.total_steps or SOME_STEPS)
    state, batch = state_of(training, mesh), comparison_batch(config.comparisons, mesh)
    passes = Passes(config.tokens_per_step, config.comparisons.length_tokens)
    update = _update(config, training, state, batch, passes)
    params = num_score_params(shape)
    return Stage(
        mesh, params, resident_bytes(state), [update], config.tokens_per_step, config.total_steps
    )


def _plan_preference(config: DirectPreferenceConfig, shape: TransformerConfig, mesh: Mesh) -> Stage:
    training = assemble_preference_training(config, shape, mesh, config.total_steps or SOME_STEPS)
    models = Models(training.model, None)
    state, batch = state_of(training, mesh), comparison_batch(config.comparisons, mesh)
    frozen = frozen_models(models, mesh) if config.preference.needs_reference else {}
    resident = resident_bytes(state) | reference_bytes(frozen)
    length, tokens = config.comparisons.length_tokens, config.tokens_per_step
    programs = []
    if config.preference.needs_reference:
        add_reference = make_reference_step(
            training.model,
            models.reference,
            mesh,
            config.preference,
            tile_tokens=config.loss_tile_tokens,
        )
        looks, used = 1, device_bytes(models.reference_params({"policy": state.params}, frozen))
        looked_at, batch = batch, batch | {"reference_log_probs": batch["levels"]}
        if config.preference.method == "kto":  # looks at mismatched responses, by both models
            looks, used = 3, resident["parameters"] + resident.get("reference", 0.0)
            batch["mismatched_kl"] = batch["margins"]
        programs.append(
            StageProgram(
                "reference",
                lambda: _lower_reference(add_reference, models, state.params, frozen, looked_at),
                kernels=_kernels(config, training, Passes(looks * tokens, length, backward=False)),
                moved=used,
                beside=sum(resident.values()) - used,
            )
        )
    update = _update(config, training, state, batch, Passes(tokens, length))
    programs.append(update._replace(beside=resident.get("reference", 0.0)))
    return Stage(mesh, num_params(shape), resident, programs, tokens, config.total_steps)


def _lower_reference(
    look: ReferenceStep, models: Models, params: dict, frozen: dict, batch: dict
) -> jax.stages.Lowered:
    if not models.shared:
        return look.lower(params, frozen["reference"], batch)

    def look_by_one(params, _, batch):  # a trunk that both stand on is one argument
        return look.jitted(params, models.reference_params({"policy": params}, {}), batch)

    return ReferenceStep(jax.jit(look_by_one), look.mesh).lower(params, {}, batch)


def _update(
    config: StageConfig, training: Training, state: TrainState, batch: dict, passes: Passes
) -> StageProgram:
    return StageProgram(
        "update",
        lambda: training.train_step.lower(state, batch),
        kernels=_kernels(config, training, passes),
        moved=updated_bytes(state, training.rates),
    )


def _kernels(config: StageConfig, training: Training, passes: Passes) -> float:
    return kernel_flops(training.model.config, config.compute, training.rates, passes)
