"""Takes a step twice now and then: hardware that computes something else the second time shows.
Second floor. A bit that flips in a chip raises nothing, and a checkpoint's checksums bless it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm.training.digests import array_digests
from llm.training.manifests import shorten


class SilentCorruptionError(RuntimeError):
    """The same step of the same state and batch gave other bits the second time."""


def replayed(step_fn: Callable[..., tuple[Any, Any]], every_steps: int) -> Callable[..., Any]:
    """Return the step, which at every so many calls is taken twice and compared; 0: never.

    `step_fn` is (state, …) → (state, metrics), and may donate the state; the state has a field
    `step`. A replay takes a second step's time and a copy of the state, and waits for the devices.
    Two steps agree bit for bit on CPU (tested); on GPU that needs deterministic kernels.
    """
    if not every_steps:
        return step_fn
    return ReplayedStep(step_fn, every_steps)


class ReplayedStep:
    """See `replayed`."""

    def __init__(self, step_fn: Callable[..., tuple[Any, Any]], every_steps: int):
        self._step_fn, self._every_steps = step_fn, every_steps
        self._calls = 0

    def __call__(self, state: Any, *arguments: Any) -> tuple[Any, Any]:
        """Take the step.

        Raises:
          SilentCorruptionError: it was replayed and two results differ.
        """
        self._calls += 1
        if self._calls % self._every_steps:
            return self._step_fn(state, *arguments)
        number = int(state.step) + 1
        first = self._step_fn(jax.tree.map(jnp.copy, state), *arguments)
        # Of the first only checksums are kept: three states at once may not fit.
        expected = _digests(*first)
        del first
        second = self._step_fn(state, *arguments)
        found = _digests(*second)
        differing = [name for name in expected if expected[name] != found[name]]
        if differing:
            raise SilentCorruptionError(
                f"step {number} was taken twice and differs in {len(differing)} of {len(found)} "
                f"arrays ({shorten(differing)}): memory or a chip of this host flips bits, or a "
                "kernel is not deterministic. Checkpoints since the last replay are in doubt; test "
                "the hardware before going on"
            )
        return second


def _digests(state: Any, metrics: Any) -> dict[str, str]:
    return array_digests({"state": state, "metrics": metrics})
