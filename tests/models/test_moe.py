"""Experts against a plain loop over tokens and experts, the two forms against each other."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.interop.mup import fold_mup
from llm.models.adapters import adapt_params, is_factor, merge_params
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.grouped_dot import grouped_dot, outer_by_kernel
from llm.models.moe import MixtureOfExperts
from llm.models.router import gather_sums
from llm.models.transformer import Transformer, init_params
from llm.models.unstack import unstack
from llm.objectives.router import dropped_share, largest_expert_share, load_balance_loss
from llm.training.loss import make_causal_lm_loss

CONFIG = TransformerConfig(
    vocab_size=60,
    width=8,
    num_layers=3,
    prefix_layers=("global",),
    cycle_layers=("global_moe",),
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=10,
    num_experts=6,
    experts_per_token=2,
    expert_mlp_width=5,
    max_length_tokens=32,
    vocab_multiple=4,
)
B, T = 3, 10
KINDS = {
    "mixtral": {},
    "qwen3": dict(router_renormalise=False, experts_per_token=3),
    "deepseek": dict(
        router_scores="sigmoid", router_scale=2.5, shared_expert_width=7, experts_per_token=1
    ),
    "ungated": dict(activation="relu_squared"),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def block(config):
    """Return (module, float64 parameters whose routers are far from undecided, inputs)."""
    module = MixtureOfExperts(config, ComputeConfig(dtype="float64"), AdapterConfig())
    x = np.random.default_rng(0).normal(size=(B, T, config.width))
    shapes = jax.eval_shape(
        lambda: nn.unbox(module.init(jax.random.key(0), jnp.asarray(x), real=None))["params"]
    )
    random = np.random.default_rng(1)
    return module, jax.tree.map(lambda s: random.normal(0, 0.5, s.shape), shapes), x


def logits_of(model, params, tokens):
    return jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens)


def by_hand(config, params, x, real=None, capacity=None):
    """Return (outputs, choices dropped): each token by itself, one expert after the other."""

    def feed(up, down, gate, token):
        hidden = token @ up
        if gate is None:
            return np.maximum(hidden, 0) ** 2 @ down
        gated = token @ gate
        return (gated / (1 + np.exp(-gated)) * hidden) @ down

    kernels = lambda tree: [  # noqa: E731
        tree[name]["kernel"] if name in tree else None for name in ("up", "down", "gate")
    ]
    out, dropped = np.zeros_like(x), 0
    for b in range(x.shape[0]):
        load = np.zeros(config.num_experts, int)
        for t in range(x.shape[1]):
            token = x[b, t]
            if config.shared_expert_width:
                out[b, t] += feed(*kernels(params["shared"]), token)
            if real is not None and not real[b, t]:
                continue
            logits = token @ params["router"]["scores"]["kernel"]
            scores = 1 / (1 + np.exp(-logits))
            if config.router_scores == "softmax":
                scores = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-scores)[: config.experts_per_token]
            total = scores[chosen].sum() if config.router_renormalise else 1.0
            for e in chosen:
                if capacity is not None and load[e] == capacity:
                    dropped += 1
                    continue
                load[e] += 1
                up, down, gate = kernels(params["experts"])
                mine = feed(up[e], down[e], None if gate is None else gate[e], token)
                out[b, t] += config.router_scale * scores[e] / total * mine
    return out, dropped


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_are_the_loop(kind, padded):
    config = dataclasses.replace(CONFIG, **KINDS[kind])
    module, params, x = block(config)
    real = np.arange(T) % 4 > 0 if padded else np.ones(T, bool)
    real = np.broadcast_to(real, (B, T))
    expected, _ = by_hand(config, params, x, real)
    for factor in (None, config.num_experts / config.experts_per_token, 0.5):
        form = module.clone(config=dataclasses.replace(config, expert_capacity_factor=factor))
        apply = jax.jit(functools.partial(form.apply, mutable=["router"]))
        out, variables = apply({"params": params}, x, real=jnp.asarray(real) if padded else None)
        sums, wanted, dropped = gather_sums(variables), expected, 0
        if factor == 0.5:
            capacity = int(np.ceil(0.5 * config.experts_per_token * T / config.num_experts))
            wanted, dropped = by_hand(config, params, x, real, capacity)
            assert dropped > 0
        np.testing.assert_allclose(out, wanted, atol=1e-12)
        assert sums.tokens.tolist() == [real.sum()]
        assert sums.counts.sum() == real.sum() * config.experts_per_token
        assert sums.dropped.tolist() == [dropped]


def test_gradients_of_both_forms_are_those_of_all_experts_on_all_tokens():
    module, params, x = block(CONFIG)

    def densely(params, x):
        k = {n: params["experts"][n]["kernel"] for n in ("up", "gate", "down")}
        scores = jax.nn.softmax(x @ params["router"]["scores"]["kernel"])
        kept = scores * (scores >= jnp.sort(scores)[..., -2:-1])
        gates = kept / kept.sum(-1, keepdims=True)
        hidden = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, k["gate"]))
        hidden = hidden * jnp.einsum("BTD,EDF->BTEF", x, k["up"])
        return jnp.einsum("BTEF,EFD,BTE->BTD", hidden, k["down"], gates)

    grad = jax.grad(lambda f, *args: jnp.sum(jnp.sin(f(*args))), (1, 2))
    grad = jax.jit(grad, static_argnums=0)
    expected = grad(densely, params, x)
    for factor in (None, 3.0):
        form = module.clone(config=dataclasses.replace(CONFIG, expert_capacity_factor=factor))
        found = grad(lambda p, x, m=form: m.apply({"params": p}, x, real=None), params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_full_experts_turn_later_tokens_away_and_never_earlier_ones():
    module, params, x = block(dataclasses.replace(CONFIG, expert_capacity_factor=0.5))
    changed = x.copy()
    changed[:, 6:] = np.random.default_rng(5).normal(size=changed[:, 6:].shape)
    apply = jax.jit(lambda y: module.apply({"params": params}, y, real=None))
    one, other = apply(x), apply(changed)
    np.testing.assert_array_equal(one[:, :6], other[:, :6])


def test_sums_of_parts_add_up_and_losses_are_known_where_balance_is():
    module, params, x = block(CONFIG)
    apply = functools.partial(module.apply, real=None, mutable=["router"])
    sums = jax.jit(lambda x: gather_sums(apply({"params": params}, x)[1]))
    added = jax.tree.map(jnp.add, sums(x[:1]), sums(x[1:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), added, sums(x))
    even, tokens = jnp.full((2, 6), 4.0), jnp.full(2, 12.0)  # two experts of six to each of 12
    assert load_balance_loss(even, even / 2, tokens) == pytest.approx(2.0)  # experts_per_token
    assert largest_expert_share(even) == pytest.approx(1 / 6)
    assert largest_expert_share(even.at[1, 0].set(24.0)) == pytest.approx(24 / 44)
    one = jnp.zeros((1, 6)).at[0, 0].set(12.0)  # all of one choice to one expert, and sure of it
    assert load_balance_loss(one, one, tokens[:1]) == pytest.approx(6.0)
    assert dropped_share(jnp.array([3.0, 0.0]), even) == pytest.approx(3 / 48)


def test_rows_of_no_group_give_nothing_and_vmap_is_a_loop():
    random = np.random.default_rng(0)
    rows, kernels = random.normal(size=(2, 9, 4)), random.normal(size=(2, 3, 4, 5))
    sizes = np.array([[4, 0, 3], [2, 2, 2]])
    out = np.asarray(jax.jit(jax.vmap(grouped_dot))(rows, kernels, sizes))
    loss = lambda r, k, s: jnp.sum(jnp.sin(grouped_dot(r, k, s)))  # noqa: E731
    grads = jax.vmap(jax.grad(loss, (0, 1)), in_axes=(1, 0, 0))
    to_rows, to_kernels = map(np.asarray, jax.jit(grads)(rows.swapaxes(0, 1), kernels, sizes))
    for i in range(2):
        ends = np.cumsum(sizes[i])
        for e, (start, end) in enumerate(zip(ends - sizes[i], ends, strict=True)):
            mine = slice(start, end)
            np.testing.assert_allclose(out[i, mine], rows[i, mine] @ kernels[i, e], atol=1e-12)
            slope = np.cos(out[i, mine])
            np.testing.assert_allclose(to_kernels[i, e], rows[i, mine].T @ slope, atol=1e-12)
            np.testing.assert_allclose(to_rows[i, mine], slope @ kernels[i, e].T, atol=1e-12)
        assert not np.any(out[i, ends[-1] :]) and not np.any(to_rows[i, ends[-1] :])


def test_the_tpus_kernel_of_weight_gradients_sums_over_each_group():
    """An empty group, groups that end within a tile of rows, rows of no group, odd widths."""
    random = np.random.default_rng(0)
    rows, cotangent = random.normal(size=(700, 130)), random.normal(size=(700, 40))
    sizes = np.array([100, 0, 500, 37])
    found = outer_by_kernel(*map(jnp.float32, (rows, cotangent)), jnp.array(sizes), interpret=True)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        expected = rows[start:end].T @ cotangent[start:end]
        np.testing.assert_allclose(found[e], expected, atol=1e-3)


@pytest.mark.parametrize(
    "quantize, factor", [("none", None), ("nf4", None), ("nf4", 3.0), ("int8", 3.0)]
)
def test_adapted_experts_are_the_merged_ones(quantize, factor):
    config = dataclasses.replace(
        CONFIG, expert_mlp_width=6, expert_capacity_factor=factor, num_layers=2
    )
    compute = ComputeConfig(dtype="float64")
    plain = Transformer(config, compute)
    model = Transformer(config, compute, AdapterConfig(rank=2, quantize=quantize, block=4))
    base = init_params(plain, jax.random.key(0))
    params = adapt_params(model, base, jax.random.key(1))
    random = np.random.default_rng(2)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            jnp.asarray(random.normal(0, 0.3, x.shape)) if is_factor(path[-1].key) else x
        ),
        params,
    )
    experts = params["cycle"]["layer_0"]["mlp"]["experts"]["up"]
    assert experts["lora_a"].shape == (1, 6, 8, 2) and experts["lora_b"].shape == (1, 6, 2, 6)
    tokens = jax.random.randint(jax.random.key(5), (2, 12), 0, 60)
    merged = merge_params(model, params)
    np.testing.assert_allclose(
        logits_of(model, params, tokens), logits_of(plain, merged, tokens), atol=1e-5
    )
    kernel = merged["cycle"]["layer_0"]["mlp"]["experts"]["up"]["kernel"]
    delta = (
        AdapterConfig().alpha
        / 2
        * np.einsum("LEDR,LERF->LEDF", experts["lora_a"], experts["lora_b"])
    )
    before = base["cycle"]["layer_0"]["mlp"]["experts"]["up"]["kernel"]
    off = np.abs(kernel - delta - before) / np.abs(before).max(axis=2, keepdims=True)
    assert off.max() < {"none": 1e-12, "int8": 0.005, "nf4": 0.16}[quantize]


def test_the_losses_enter_the_objective_as_weighted_and_padding_does_not():
    model = Transformer(CONFIG, ComputeConfig(dtype="float64"))
    params = init_params(model, jax.random.key(0))
    random = np.random.default_rng(0)
    tokens = random.integers(0, 60, (2, 8))
    segments = np.repeat([[1, 1, 1, 1, 2, 2, 0, 0]], 2, axis=0)
    batch = dict(tokens=tokens, targets=np.roll(tokens, -1, 1), segment_ids=segments)
    batch |= dict(positions=np.tile(np.arange(8), (2, 1)), loss_weights=1.0 * (segments > 0))
    other = batch | {"tokens": np.where(segments > 0, tokens, 7)}
    weights = dict(router_balance_weight=0.3, router_z_weight=0.2)
    plain, _ = jax.jit(make_causal_lm_loss(model))(params, batch, None)
    weighted = jax.jit(make_causal_lm_loss(model, **weights))
    objective, sums = weighted(params, batch, None)
    extra = 0.3 * sums["router_balance"] + 0.2 * sums["router_z"]
    assert objective - plain == pytest.approx(float(extra))
    assert 1.0 < sums["router_balance"] / sums["tokens"] < 6.0
    assert sums["router_dropped"] == 0
    again, _ = weighted(params, other, None)
    assert objective == pytest.approx(float(again))


def test_mups_router_is_folded_into_its_kernel_for_export():
    compute = ComputeConfig(dtype="float64")
    config = dataclasses.replace(CONFIG, mup_base_width=2)
    params = init_params(Transformer(config, compute), jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, params)
    plain, folded = fold_mup(config, params)
    tokens = jax.random.randint(jax.random.key(5), (2, 12), 0, 60)
    expected = logits_of(Transformer(config, compute), params, tokens)
    found = logits_of(Transformer(plain, compute), folded, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_decoding_keeps_the_routers_precision():
    model = Transformer(CONFIG, ComputeConfig(dtype="bfloat16"))
    with jax.enable_x64(False):
        flat = unstack(model, init_params(model, jax.random.key(0)))
    assert flat["prefix_1"]["mlp"]["router"]["scores"]["kernel"].dtype == jnp.float32
    assert flat["prefix_1"]["mlp"]["experts"]["up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_experts=0), r"model.num_experts=0: layers of kind global_moe"),
        (dict(experts_per_token=7), r"model.experts_per_token=7 exceeds num_experts=6"),
        (dict(cycle_layers=("global",)), r"model.num_experts=6, but no layer is global_moe"),
        (dict(cycle_layers=("dense",)), r"has 'dense'; they are global, local, global_moe, local_"),
        (dict(cycle_layers=("local_moe",)), r"need a positive model.sliding_window_tokens"),
        (dict(mlp_bias=True), r"model.mlp_bias=True: experts have no biases"),
        (dict(activation="none"), r"model.activation='none' leaves out"),
        (dict(expert_capacity_factor=0.0), r"model.expert_capacity_factor=0.0: must be positive"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
