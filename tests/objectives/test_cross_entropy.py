"""The tiled cross-entropy against optax on whole logits, and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.objectives.cross_entropy import tiled_cross_entropy

B, T, D, V = 3, 12, 5, 17


def unembed(head, hidden):
    logits = hidden @ head["kernel"]
    return jnp.where(jnp.arange(V + 3) < V, logits, -jnp.inf)  # three padded columns


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    head = {"kernel": jax.random.normal(keys[1], (D, V + 3))}
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return head, hidden, targets, weights


def whole(head, hidden, targets, weights, z_loss):
    logits = unembed(head, hidden)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * (loss + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2))


@pytest.mark.parametrize("tile_tokens", [1, 10, 36, 1000])
def test_value_and_gradients_equal_those_of_whole_logits(inputs, tile_tokens):
    head, hidden, targets, weights = inputs
    tiled = functools.partial(tiled_cross_entropy, unembed, tile_tokens, 0.03)
    (value, sums), grads = jax.jit(jax.value_and_grad(tiled, argnums=(0, 1), has_aux=True))(*inputs)
    expected, expected_grads = jax.value_and_grad(whole, argnums=(0, 1))(*inputs, 0.03)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(tiled(*inputs)[0], expected, rtol=1e-6)  # without a gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)
    np.testing.assert_allclose(sums["loss"], whole(*inputs, 0.0), rtol=1e-6)
    correct = (jnp.argmax(unembed(head, hidden), -1) == targets) * weights
    assert sums["correct"] == correct.sum()


def test_uniform_logits_cost_log_v_a_token():
    zeros = {"kernel": jnp.zeros((D, V + 3))}
    targets = jnp.arange(B * T).reshape(B, T) % V
    value, _ = tiled_cross_entropy(
        unembed, 8, 0.0, zeros, jnp.ones((B, T, D)), targets, jnp.ones((B, T))
    )
    assert float(value) == pytest.approx(B * T * math.log(V), rel=1e-6)


def test_logits_exist_for_one_tile_at_a_time(inputs):
    """The compiled gradient allocates less than the float32 logits it stands for."""
    length, vocabulary = 1024, 4096
    shapes = (
        {"kernel": jax.ShapeDtypeStruct((D, vocabulary), jnp.float32)},
        jax.ShapeDtypeStruct((B, length, D), jnp.float32),
        jax.ShapeDtypeStruct((B, length), jnp.int32),
        jax.ShapeDtypeStruct((B, length), jnp.float32),
    )

    def loss(*arrays):
        return tiled_cross_entropy(lambda h, x: x @ h["kernel"], 128, 0.0, *arrays)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < B * length * vocabulary * 4 / 4
