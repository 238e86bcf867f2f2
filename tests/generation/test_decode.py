"""Generation against the full forward pass: greedy, sampled, ended, streamed, sharded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from llm.generation.config import SamplingConfig
from llm.generation.decode import make_decoder, make_generate
from llm.generation.prompts import bucket_length, pad_prompts, sequence_keys
from llm.models.transformer import logical_axes
from llm.models.unstack import unstack, unstacked
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import make_shardings
from tests.generation.small_models import VOCAB, build

NEW = 8
LENGTHS = (14, 9, 3)
PROMPTS = [np.random.default_rng(i).integers(1, VOCAB, n).tolist() for i, n in enumerate(LENGTHS)]
GREEDY = SamplingConfig(max_new_tokens=NEW, temperature=0.0)


def generate(model, params, sampling, prompts=PROMPTS, key=0, **ends):
    """Return a Generation as NumPy arrays."""
    keys = sequence_keys(jax.random.key(key), len(prompts))
    out = make_generate(model, sampling, **ends)(params, *pad_prompts(prompts), keys)
    return jax.tree.map(np.asarray, out)


@functools.cache
def greedy(kind):
    return generate(*build(kind), GREEDY)


def full_logits(model, params, generation, prompts=PROMPTS):
    """Return logits [B NEW V] that the full forward gives at each generated token, row by row."""
    rows = [p + t.tolist() for p, t in zip(prompts, generation.tokens, strict=True)]
    padded = np.array([row + [0] * (32 - len(row)) for row in rows], np.int32)
    logits = jax.jit(lambda t: model.apply({"params": params}, t))(padded)
    return np.stack([x[len(p) - 1 :][:NEW] for x, p in zip(logits, prompts, strict=True)])


def log_softmax_at(logits, tokens):
    return np.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("kind", ["gpt2", "alibi_mqa", "prefix_and_cycle"])
def test_greedy_takes_the_likeliest_token_of_the_full_forward(kind):
    model, params = build(kind)
    out = greedy(kind)
    want = full_logits(model, params, out)
    np.testing.assert_array_equal(out.tokens, want.argmax(-1))
    assert len(set(out.tokens.ravel().tolist())) > 6  # no model that says one thing only
    np.testing.assert_allclose(out.log_probs, log_softmax_at(want, out.tokens), atol=1e-5)
    assert out.lengths.tolist() == [NEW] * 3 and not out.finished.any()


def test_prompts_together_give_what_each_gives_alone_in_any_bucket():
    model, params = build("llama")
    run, together = make_generate(model, GREEDY), greedy("llama").tokens
    keys = sequence_keys(jax.random.key(0), 3)
    for i, prompt in enumerate(PROMPTS):
        alone = run(params, *pad_prompts([prompt]), keys[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], together[i])
    assert run._cache_size() == 1  # their lengths share a bucket
    wide = [np.pad(x, ((0, 0), (9, 0))) if x.ndim == 2 else x for x in pad_prompts(PROMPTS)]
    np.testing.assert_array_equal(run(params, *wide, keys).tokens, together)


def test_several_continuations_are_those_of_the_prompt_given_as_often():
    model, params = build("llama")
    options = {"temperature": 1.2, "repetition_penalty": 1.3}
    run = make_generate(model, SamplingConfig(max_new_tokens=NEW, **options))
    keys = sequence_keys(jax.random.key(5), 6)
    shared = run(params, *pad_prompts(PROMPTS), keys)
    rows, lengths = (np.repeat(x, 2, axis=0) for x in pad_prompts(PROMPTS))
    apart = run(params, rows, lengths, keys)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    np.testing.assert_allclose(shared.log_probs, apart.log_probs, atol=1e-5)
    assert np.any(shared.tokens[0] != shared.tokens[1])


def test_sampled_tokens_depend_on_prompt_and_key_alone():
    model, params = build("gpt2")
    run = make_generate(model, SamplingConfig(max_new_tokens=NEW, temperature=1.2, top_p=0.9))
    keys = sequence_keys(jax.random.key(5), 3)
    together = run(params, *pad_prompts(PROMPTS), keys)
    order = np.array([2, 0, 1])
    other = run(params, *pad_prompts([PROMPTS[i] for i in order]), keys[order])
    np.testing.assert_array_equal(other.tokens, together.tokens[order])
    again = run(params, *pad_prompts(PROMPTS), sequence_keys(jax.random.key(6), 3))
    assert np.any(again.tokens != together.tokens)
    np.testing.assert_array_equal(
        jax.random.key_data(sequence_keys(jax.random.key(5), 2)), jax.random.key_data(keys[:2])
    )


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_new_tokens=NEW, temperature=0.7),
        SamplingConfig(max_new_tokens=NEW, temperature=1.5, top_k=5, min_p=0.01),
    ],
    ids=["plain", "filtered"],
)
def test_log_probs_are_those_of_a_trainer_that_divides_by_the_temperature(sampling):
    model, params = build("llama")
    out = generate(model, params, sampling)
    want = full_logits(model, params, out) / sampling.temperature
    np.testing.assert_allclose(out.log_probs, log_softmax_at(want, out.tokens), atol=1e-5)
    if sampling.top_k is not None:
        rank = (want > np.take_along_axis(want, out.tokens[..., None], -1)).sum(-1)
        assert rank.max() < sampling.top_k


def test_pairs_of_tokens_follow_the_exact_probabilities():
    model, params = build("llama")
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, vocab_size=3, vocab_multiple=64)
    )
    prompt, draws = [1, 2, 0, 2], 10_000
    sampling = SamplingConfig(max_new_tokens=2, temperature=1.5)
    out = generate(model, params, sampling, prompts=[prompt] * draws)
    rows = jnp.array([prompt + [first] for first in range(3)])
    logits = model.apply({"params": params}, rows)[:, 3:, :3] / 1.5
    first, second = jax.nn.softmax(logits[0, 0]), jax.nn.softmax(logits[:, 1], axis=-1)
    exact = np.asarray(first[:, None] * second).ravel()
    counts = np.bincount(out.tokens @ [3, 1], minlength=9)
    expected = exact * draws
    assert expected.min() > 5  # where the chi-square law holds
    # 26.12: the value that eight degrees of freedom exceed once in a thousand
    assert np.sum((counts - expected) ** 2 / expected) < 26.12


def test_a_sequence_ends_at_any_of_several_eos_tokens_and_the_others_go_on():
    model, params = build("gpt2")
    free = greedy("gpt2")
    rows = free.tokens.tolist()
    ends = (rows[0][2], rows[1][5])
    stops = [next((i for i, token in enumerate(row) if token in ends), None) for row in rows]
    assert stops[0] is not None and stops[1] is not None
    out = generate(model, params, GREEDY, eos_ids=ends, pad_id=60)
    for i, stop in enumerate(stops):
        length = NEW if stop is None else stop + 1
        assert out.lengths[i] == length and out.finished[i] == (stop is not None)
        assert out.tokens[i, :length].tolist() == rows[i][:length]
        assert np.all(out.tokens[i, length:] == 60) and np.all(out.log_probs[i, length:] == 0)
        np.testing.assert_allclose(out.log_probs[i, :length], free.log_probs[i, :length], atol=1e-6)


def test_the_loop_stops_with_the_last_sequence_and_goes_on_in_chunks():
    model, params = build("gpt2")
    rows = greedy("gpt2").tokens
    flat, params = unstacked(model), unstack(model, params)
    keys = sequence_keys(jax.random.key(0), 3)
    # each row ends at its own fourth token at the latest
    ends = tuple(int(row[3]) for row in rows)
    prefill, advance = make_decoder(flat, GREEDY, eos_ids=ends)
    state = jax.jit(prefill)(params, *pad_prompts(PROMPTS), keys)
    assert int(state.step) == 1
    advance = jax.jit(advance)
    state = advance(params, state, 2)
    assert int(state.step) == 3
    state = advance(params, state, 100)
    assert int(state.step) == int(state.generation.lengths.max()) <= 4
    assert state.generation.finished.all()


def test_the_repetition_penalty_counts_prompt_and_reply_but_no_padding():
    model, params = build("llama")
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0, repetition_penalty=1.4)
    prompts = [[5, 9, 9, 2], [7] * 12]
    out = generate(model, params, sampling, prompts=prompts)
    logits = full_logits(model, params, out, prompts)
    penalty = RepetitionPenaltyLogitsProcessor(1.4)
    for b, prompt in enumerate(prompts):
        for t in range(NEW):
            ids = torch.tensor([prompt + out.tokens[b, :t].tolist()])
            scores = penalty(ids, torch.tensor(logits[b, t][None]))
            assert int(scores.argmax()) == out.tokens[b, t]


def test_one_new_token_needs_no_loop():
    sampling = dataclasses.replace(GREEDY, max_new_tokens=1)
    out = generate(*build("llama"), sampling)
    np.testing.assert_array_equal(out.tokens, greedy("llama").tokens[:, :1])


def test_a_mesh_changes_no_token():
    model, params = build("llama")
    prompts = PROMPTS + PROMPTS[:1]
    want = generate(model, params, GREEDY, prompts=prompts)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, make_shardings(mesh, logical_axes(model), params))
        out = generate(model, sharded, GREEDY, prompts=prompts)
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_allclose(out.log_probs, want.log_probs, atol=1e-5)


def test_the_cache_is_updated_in_place():
    """Two layers' keys and values are written once each; a copy costs a whole cache a token."""
    model, params = build("llama")
    flat, params = unstacked(model), unstack(model, params)
    prefill, advance = make_decoder(flat, GREEDY)
    keys = sequence_keys(jax.random.key(0), 3)
    state = jax.jit(prefill)(params, *pad_prompts(PROMPTS), keys)
    step = jax.jit(advance, donate_argnums=1).lower(params, state, 4).compile()
    made = [line for line in step.as_text().splitlines() if " = f32[3,2,24,6]" in line]
    assert sum(" dynamic-update-slice(" in line for line in made) == 4
    assert not [line for line in made if " copy(" in line]


def test_prompts_are_padded_on_the_left_to_few_lengths():
    rows, lengths = pad_prompts([[1, 2, 3], [4]], pad_id=9)
    assert rows.shape == (2, 16) and lengths.tolist() == [3, 1]
    assert rows[0].tolist() == [9] * 13 + [1, 2, 3] and rows[1].tolist() == [9] * 15 + [4]
    lengths = [bucket_length(n) for n in (1, 16, 17, 200, 256, 257, 512, 513)]
    assert lengths == [16, 16, 32, 256, 256, 512, 512, 768]
    with pytest.raises(ValueError, match="each needs at least one"):
        pad_prompts([[1], []])
