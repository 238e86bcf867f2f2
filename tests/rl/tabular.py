"""Tabular autoregressive policies over a tiny vocabulary: every response listed, so that
expectations are sums and optima have closed forms."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EOS, VOCAB, LENGTH = 0, 3, 3


class Responses(NamedTuple):
    """All responses that end in EOS or at the limit of LENGTH tokens, padded on the right."""

    tokens: np.ndarray  # [B T]
    mask: np.ndarray  # [B T], EOS included
    states: np.ndarray  # [B T]: the prefix before each token, by number


def all_responses() -> Responses:
    prefixes = [()]
    for length in range(1, LENGTH):
        prefixes += itertools.product(range(1, VOCAB), repeat=length)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    rows = []
    for prefix in prefixes:
        rows.append((*prefix, EOS))
    rows += itertools.product(range(1, VOCAB), repeat=LENGTH)  # cut at the limit
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    mask = np.zeros((len(rows), LENGTH))
    states = np.zeros((len(rows), LENGTH), np.int32)
    for b, row in enumerate(rows):
        for t, token in enumerate(row):
            tokens[b, t], mask[b, t], states[b, t] = token, 1.0, number[row[:t]]
    return Responses(tokens, mask, states)


ALL = all_responses()
NUM_STATES = int(ALL.states.max()) + 1


def token_log_probs(logits, temperature=1.0):
    """Return log softmax(logits / temperature) of every response's tokens [B T]; 0 on padding."""
    table = jax.nn.log_softmax(logits / temperature, axis=-1)
    return jnp.where(ALL.mask > 0, table[ALL.states, ALL.tokens], 0.0)


def probabilities(logits, temperature=1.0):
    """Return the probability of every response [B]."""
    return jnp.exp(jnp.sum(token_log_probs(logits, temperature), axis=1))


def random_logits(seed, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (NUM_STATES, VOCAB)))


def random_rewards(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, len(ALL.tokens)))


def divergence(p, q):
    """Return KL(p‖q) in nats."""
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(p) - jnp.log(q)), 0.0))


def optimum(reference, rewards, beta):
    """Return (π*, log Z) of E[r] − β·KL(π‖π_ref): π* ∝ π_ref·exp(r/β)."""
    weights = jnp.log(reference) + rewards / beta
    return jax.nn.softmax(weights), jax.nn.logsumexp(weights)
