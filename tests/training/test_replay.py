"""A step taken twice: equal bits pass unchanged, a flipped one is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.training.replay import SilentCorruptionError, replayed
from tests.training.toy_loop import ToyBatches, toy_state, toy_step

EVERY, STEPS = 3, 8


def train(step_fn, steps=STEPS):
    state, batches = toy_state(), ToyBatches()
    for _ in range(steps):
        state, _ = step_fn(state, next(batches))
    return state


def test_a_replay_changes_nothing():
    calls = []

    def counted(state, batch):
        calls.append(int(state.step) + 1)
        return toy_step(state, batch)

    state, plain = train(replayed(counted, EVERY)), train(toy_step)
    assert calls == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert replayed(toy_step, 0) is toy_step


@pytest.mark.parametrize("call", [6, 7])  # of the two times that step 6 is taken, either
@pytest.mark.parametrize("bit", [0, 30])  # the least of the mantissa and the highest exponent
def test_one_flipped_bit_names_the_step(call, bit):
    calls = []

    def faulty(state, batch):
        state, metrics = toy_step(state, batch)
        calls.append(1)
        if len(calls) == call + 1:
            kernel = np.array(state.params["kernel"])
            kernel.view(np.uint32)[5, 7] ^= np.uint32(1 << bit)
            state = state.replace(params=state.params | {"kernel": jnp.asarray(kernel)})
        return state, metrics

    with pytest.raises(SilentCorruptionError, match="step 6 .*1 of .*state/params/kernel"):
        train(replayed(faulty, EVERY))


def test_a_bit_of_a_metric_counts_too():
    calls = []

    def faulty(state, batch):
        state, metrics = toy_step(state, batch)
        calls.append(1)
        return state, metrics | {"train/loss": metrics["train/loss"] + 1e-6 * (len(calls) == 3)}

    with pytest.raises(SilentCorruptionError, match="step 3 .*metrics/train/loss"):
        train(replayed(faulty, EVERY))
