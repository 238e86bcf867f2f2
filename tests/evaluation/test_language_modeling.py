"""Scores of text: windows count each target once, and packed and sliding readings agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.data.prepared import StoredDocument, write_split
from llm.evaluation.language_modeling import (
    TextScore,
    make_score_step,
    make_stacked_score_step,
    score_documents,
    score_split,
    score_splits,
)
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh

VOCAB, LENGTH = 50, 16
MODEL = Transformer(
    TransformerConfig(
        vocab_size=VOCAB,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=32,
        max_length_tokens=LENGTH,
        initializer="fan_in",
    )
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def step():
    return make_score_step(MODEL, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    return [random.integers(0, VOCAB, n).astype(np.int32) for n in (40, 9, 2, 17, 33)]


def log_probs(params, tokens):
    logits = MODEL.apply({"params": params}, jnp.asarray(tokens)[None])[0, :, :VOCAB]
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def test_every_target_is_scored_once_whatever_the_stride(step, params, documents):
    pairs = sum(len(d) - 1 for d in documents)
    stored = [StoredDocument(d, 3) for d in documents]
    for stride in (1, 5, 8, LENGTH):
        score = score_documents(
            step, params, stored, row_length=LENGTH, batch_tokens=64,
            stride=stride,
        )  # fmt: skip
        assert score.tokens == pairs and score.num_bytes == 3 * len(documents)


@pytest.mark.long
def test_sliding_by_one_gives_each_target_the_fullest_context(step, params, documents):
    tokens = documents[0][:24]
    expected = 0.0
    for target in range(1, len(tokens)):
        context = tokens[max(0, target - LENGTH) : target]
        expected -= log_probs(params, context)[-1, tokens[target]]
    score = score_documents(
        step, params, [StoredDocument(tokens, 1)], row_length=LENGTH, batch_tokens=64, stride=1
    )
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_packed_rows_score_as_windows_without_overlap(step, params, documents, tmp_path):
    """Packing changes which row a piece lies in, not what it costs."""
    split = write_split(
        tmp_path / "split", [StoredDocument(d, num_bytes=2 * len(d)) for d in documents], VOCAB
    )
    packed = score_split(step, params, split, row_length=LENGTH, batch_sequences=2)
    apart = score_documents(
        step, params, split.documents(), row_length=LENGTH, batch_tokens=64, stride=LENGTH
    )
    assert packed.tokens == apart.tokens == sum(len(d) - 1 for d in documents)
    assert packed.nats == pytest.approx(apart.nats, rel=1e-5)
    assert packed.bits_per_byte == pytest.approx(apart.bits_per_byte, rel=1e-5)


def test_packed_conversations_cost_what_each_costs_alone(step, params, documents, tmp_path):
    """Loss on masked tokens only, and nothing leaks from one conversation to the next."""
    random = np.random.default_rng(4)
    masks = [random.random(len(d)) < 0.5 for d in documents]
    stored = [StoredDocument(d, 7, m) for d, m in zip(documents, masks, strict=True)]
    split = write_split(tmp_path / "split", stored, VOCAB, masked=True)
    length = max(map(len, documents)) - 1  # none is cut
    packed = score_split(step, params, split, row_length=length, batch_sequences=2)
    expected = count = 0.0
    for tokens, mask in zip(documents, masks, strict=True):
        if len(tokens) > 1:
            probs = log_probs(params, tokens[:-1])
            expected -= sum(probs[i, tokens[i + 1]] for i in np.flatnonzero(mask[1:]))
            count += mask[1:].sum()
    assert packed.tokens == count == split.num_targets.sum()
    assert packed.nats == pytest.approx(expected, rel=1e-5)
    apart = score_documents(step, params, split.documents(), row_length=length, batch_tokens=64)
    assert (apart.tokens, apart.num_bytes) == (count, 7 * len(documents))
    assert apart.nats == pytest.approx(expected, rel=1e-5)


def test_in_context_score_is_the_loss_of_late_targets_less_that_of_early_ones(
    step, params, tmp_path
):
    """Two documents of a row each and one that is too short to have late targets."""
    random = np.random.default_rng(7)
    documents = [random.integers(0, VOCAB, n).astype(np.int32) for n in (17, 17, 9)]
    split = write_split(tmp_path / "split", [StoredDocument(d, 1) for d in documents], VOCAB)
    nats = [-log_probs(params, d[:-1])[np.arange(len(d) - 1), d[1:]] for d in documents]
    early = np.mean([found[1] for found in nats])  # 1/16 to 1/8 of 16 tokens
    late = np.mean([found[14:] for found in nats[:2]])
    options = dict(row_length=LENGTH, batch_sequences=2)
    score = score_split(step, params, split, **options)
    assert score.in_context_score == pytest.approx(late - early, rel=1e-4)
    short = write_split(tmp_path / "short", [StoredDocument(documents[2], 1)], VOCAB)
    metrics = score_splits(step, params, {"short": short}, **options)
    assert set(metrics) == {"eval/short/loss", "eval/short/bits_per_byte"}


def test_stacked_models_score_as_each_alone(step, params, documents, tmp_path):
    other = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(1))
    both = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    splits = {"a": write_split(tmp_path / "a", [StoredDocument(d, 3) for d in documents], VOCAB)}
    options = dict(row_length=LENGTH, batch_sequences=2)
    stacked = score_splits(make_stacked_score_step(MODEL), both, splits, **options)
    for i, alone in enumerate((params, other)):
        for name, value in score_splits(step, alone, splits, **options).items():
            assert stacked[name][i] == pytest.approx(value, rel=1e-5), name


def test_metrics_of_several_sources_have_an_all(step, params, documents, tmp_path):
    splits = {
        name: write_split(
            tmp_path / name, [StoredDocument(d, num_bytes=len(d)) for d in part], VOCAB
        )
        for name, part in {"a": documents[:2], "b": documents[2:]}.items()
    }
    metrics = score_splits(step, params, splits, row_length=LENGTH, batch_sequences=2)
    tokens = {"a": 39 + 8, "b": 1 + 16 + 32}
    mean = sum(tokens[n] * metrics[f"eval/{n}/loss"] for n in tokens) / sum(tokens.values())
    assert metrics["eval/all/loss"] == pytest.approx(mean, rel=1e-6)


def test_bits_per_byte_by_hand():
    score = TextScore(nats=math.log(2) * 24, tokens=6, num_bytes=8)
    assert score.bits_per_byte == pytest.approx(3.0)
    assert score.loss_nats_per_token == pytest.approx(math.log(2) * 4)
