"""Induction scores and Fourier spectra where they are known; scores of answers by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.evaluation.answers import answer_scores
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params
from llm.models.unstack import unstack, unstacked
from llm.scaling.fourier import fourier_power, key_frequencies
from llm.scaling.induction import attention_weights, prefix_matching_scores

ATTENTION_ONLY = TransformerConfig(
    vocab_size=20,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=8,
    max_length_tokens=16,
    activation="none",
)


def test_attention_alone_has_no_feed_forward():
    params = init_params(Transformer(ATTENTION_ONLY), jax.random.key(0))
    assert set(params["cycle"]["layer_0"]) == {"attention", "attention_norm"}
    whole = dataclasses.replace(ATTENTION_ONLY, activation="relu")
    assert "mlp" in init_params(Transformer(whole), jax.random.key(0))["cycle"]["layer_0"]


def test_attention_weights_are_the_models_own():
    """Mixed by them, the values give what the attention puts out."""
    model = Transformer(ATTENTION_ONLY)
    params = init_params(model, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (3, 8), 0, 20)
    weights = attention_weights(model, params, tokens)
    assert weights.shape == (2, 3, 4, 8, 8)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert float(jnp.max(jnp.triu(weights, 1))) == 0.0

    flat = unstack(model, params)
    _, seen = unstacked(model).apply(
        {"params": flat},
        tokens,
        capture_intermediates=lambda module, _: module.name in ("value", "out"),
        mutable=["intermediates"],
    )
    for i in range(2):
        layer = seen["intermediates"][f"prefix_{i}"]["attention"]
        value = jnp.repeat(layer["value"]["__call__"][0], 2, axis=2)
        mixed = jnp.einsum("BNTS,BSNH->BTNH", weights[i], value)
        out = jnp.einsum("BTNH,NHD->BTD", mixed, flat[f"prefix_{i}"]["attention"]["out"]["kernel"])
        np.testing.assert_allclose(out, layer["out"]["__call__"][0], atol=1e-6)


def test_a_perfect_induction_head_scores_one():
    segment = 5
    weights = np.zeros((1, 2, 2, 10, 10), np.float32)
    weights[..., np.arange(10), np.arange(10)] = 1.0  # head 0 looks at itself
    weights[:, :, 1] = 0.0
    for query in range(5, 10):  # head 1 at the token after the same one
        weights[:, :, 1, query, query - segment + 1] = 1.0
    scores = prefix_matching_scores(jnp.asarray(weights), segment)
    np.testing.assert_array_equal(scores, [[0.0, 1.0]])
    even = np.tril(np.ones((1, 1, 1, 10, 10), np.float32))
    even /= even.sum(-1, keepdims=True)
    expected = np.mean([1 / (query + 1) for query in range(5, 10)])
    np.testing.assert_allclose(prefix_matching_scores(jnp.asarray(even), 5), [[expected]])


def test_spectrum_of_two_frequencies():
    p, angle = 59, 2 * np.pi * np.arange(59) / 59
    columns = [2 * np.cos(7 * angle), 2 * np.sin(7 * angle), np.cos(20 * angle + 1), np.ones(p)]
    power = fourier_power(np.stack(columns, axis=1))
    assert power.shape == (29,)
    assert power[6] == pytest.approx(8 / 9)
    assert power[19] == pytest.approx(1 / 9)
    assert power.sum() == pytest.approx(1)
    assert key_frequencies(power, 0.85) == [7]
    assert key_frequencies(power, 0.95) == [7, 20]


def test_a_random_embedding_has_no_key_frequencies():
    power = fourier_power(np.random.default_rng(0).standard_normal((59, 128)))
    assert power.max() < 2 / 29
    assert len(key_frequencies(power)) > 20


def test_answers_by_hand():
    log_p = np.log(
        np.array([[[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], [[0.5, 0.5], [0.2, 0.8], [0.3, 0.7]]])
    )
    targets = jnp.array([[1, 1, 0], [0, 1, 0]])
    weights = jnp.array([[0.0, 1, 1], [0.0, 1, 1]])
    scores = answer_scores(jnp.asarray(log_p, jnp.float32), targets, weights)
    assert float(scores["exact_match"]) == 0.5
    assert float(scores["token_accuracy"]) == 0.75
    nats = -(np.log(0.6) + np.log(0.9) + np.log(0.8) + np.log(0.3)) / 2
    assert float(scores["answer_nats"]) == pytest.approx(nats, rel=1e-5)
    assert float(scores["product_of_accuracies"]) == pytest.approx(1.0 * 0.5)
