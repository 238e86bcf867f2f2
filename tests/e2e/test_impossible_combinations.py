"""Configs whose every field is good and which may still be impossible: as far as the first step.

Pairs and triples of fields take small values; what can be built is traced, never compiled. What
cannot is one error of the house's that names a field. HYPOTHESIS_PROFILE=long searches longer.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from configs.dataclass_config import ConfigError, field_types, from_config_dict, union_members
from configs.schema import PretrainConfig
from experiments.entry import _is_users_mistake
from llm.models.config import LAYER_KINDS, AdapterConfig
from llm.models.transformer import Transformer, init_params, logical_axes, param_shapes
from llm.parallel.mesh import make_mesh
from llm.training.config import TrainableConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import fresh_state, state_shardings
from llm.training.step import make_train_step, place_batch
from llm.training.trainable import make_rates, split

SMALL = {
    "model": {"vocab_size": 11, "width": 4, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
              "head_dim": 2, "mlp_width": 4, "max_length_tokens": 8, "vocab_multiple": 4},
    "data": {"length_tokens": 4, "batch_sequences": 8},
    "schedule": {"warmup_steps": 1},
    "total_steps": 4,
}  # fmt: skip
SECTIONS = ("model", "compute", "mesh", "data", "optimizer", "schedule", "")
TUPLES = st.lists(st.sampled_from(LAYER_KINDS), max_size=2).map(tuple)


def domains() -> Iterator[tuple[tuple[str, ...], st.SearchStrategy]]:
    """Yield the path of each number and choice of the sections, and a few values for it."""
    for section in SECTIONS:
        owner = field_types(PretrainConfig)[section] if section else PretrainConfig
        for name, annotation in field_types(owner).items():
            choices = [_few(member) for member in union_members(annotation)]
            if None not in choices:
                yield tuple(filter(None, (section, name))), st.one_of(choices)


def _few(annotation: Any) -> st.SearchStrategy | None:
    if annotation in (bool, type(None)):
        return st.booleans() if annotation is bool else st.none()
    if annotation is int:
        return st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 8, 64])
    if annotation is float:
        return st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1e30])
    if typing.get_origin(annotation) is Literal:
        return st.sampled_from(typing.get_args(annotation))
    return TUPLES if annotation == tuple[str, ...] else None


DOMAINS = dict(domains())
CHANGES = st.lists(st.sampled_from(sorted(DOMAINS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda paths: st.fixed_dictionaries({path: DOMAINS[path] for path in paths})
)
ADAPTERS = st.builds(
    dict,
    rank=st.sampled_from([0, 1, 3]),
    quantize=st.sampled_from(["none", "int8", "nf4"]),
    block=st.sampled_from([1, 2, 3, 64]),
    targets=st.lists(st.sampled_from(["query", "up", "gate", "out"]), max_size=2).map(tuple),
)


def trace_first_step(config: PretrainConfig, adapter: AdapterConfig) -> None:
    """Do what `experiments.pretrain` and `finetune` do before the first step, with shapes alone."""
    mesh = make_mesh(config.mesh)
    model = Transformer(config.model, config.compute, adapter)
    rates = make_rates(
        TrainableConfig(), config.model, param_shapes(model), adapted=adapter.rank > 0
    )
    optimizer = make_optimizer(
        config.optimizer, split(logical_axes(model), rates)[0], width_ratio=config.model.width_ratio
    )
    schedule = make_schedule(
        config.schedule, total_steps=config.num_steps, tokens_per_step=config.tokens_per_step
    )
    assert float(schedule(0)) >= 0 and float(schedule(config.num_steps)) >= 0
    ema = config.optimizer.ema_decay is not None
    shardings = state_shardings(model, optimizer, mesh, ema=ema, rates=rates)
    step = make_train_step(
        make_causal_lm_loss(model, z_loss=config.z_loss, tile_tokens=config.loss_tile_tokens),
        optimizer, config.optimizer, schedule, shardings, mesh,
        accumulate_steps=config.accumulate_steps, rates=rates,
    )  # fmt: skip
    init = functools.partial(init_params, model)
    state = jax.eval_shape(
        lambda key: fresh_state(init, optimizer, key, config.init_scale, ema=ema, rates=rates),
        jax.random.key(config.seed),
    )
    shape = (config.data.batch_sequences, config.data.length_tokens)
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch |= {"loss_weights": np.zeros(shape, np.float32), "cursor": np.uint32(0)}
    with jax.set_mesh(mesh):
        placed = place_batch(batch, mesh) if mesh.size > 1 else jax.tree.map(jnp.asarray, batch)
        jax.eval_shape(step.jitted, state, placed)


@settings(max_examples=10 if settings().derandomize else 1000, phases=set(Phase) - {Phase.explain})
@example({("mesh", "context"): 8}, {})
@example({("mesh", "data"): 1}, {})
@example({("compute", "attention_kernel"): "cudnn"}, {})
@example({("compute", "dtype"): "float64"}, {})
@example({("schedule", "warmup_steps"): 6}, {})
@given(CHANGES, ADAPTERS | st.just({}))
def test_a_combination_is_built_or_told(changes, adapter):
    fields = {name: dict(v) if isinstance(v, dict) else v for name, v in SMALL.items()}
    for path, value in changes.items():
        section = fields if len(path) == 1 else fields.setdefault(path[0], {})
        section[path[-1]] = value
    try:
        config = from_config_dict(fields, PretrainConfig)
        trace_first_step(config, from_config_dict(adapter, AdapterConfig, "config.adapter"))
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        names = [path[-1] for path in DOMAINS] + [f.name for f in dataclasses.fields(AdapterConfig)]
        named = any(re.search(rf"\b{name}\b", str(error)) for name in names)
        assert named and len(str(error)) < 600, str(error)
        assert "\n" not in str(error) or isinstance(error, ConfigError), str(error)
