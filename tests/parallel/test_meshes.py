"""Every mesh trains as one device does: loss, gradient and five steps, in float64, in each stage.

The tolerance: sums taken in another order move a float64 by some 1e-16 of itself; five steps of
Adam and the few parts of PPO that compute in float32 (advantages are whitened there) blow that up
to 1e-11 of the largest parameter, and 1e-9 leaves room. `python -m benchmarks.meshes` prints them.
"""

import functools

import jax
import pytest

from benchmarks.meshes import CASES, STAGES, Case, difference, one, run_stage

TOLERANCE = 1e-9
QUICK = {"pretrain": ("fsdp 2 × context 2 × tensor 2", "fsdp 2 × expert 2 × pipeline 2")}


@functools.cache
def alone(stage, model):
    return run_stage(stage, Case(one(), {}, dict(model)))


def param(stage, case):
    quick = any(name in case.name for name in QUICK.get(stage, ()))
    return pytest.param(
        stage, case, id=f"{stage}: {case.name}", marks=() if quick else pytest.mark.long
    )


@pytest.mark.parametrize(
    ("stage", "case"), [param(stage, case) for stage in STAGES for case in CASES]
)
def test_a_mesh_trains_as_one_device(stage, case):
    with jax.enable_x64(True):
        found, reference = run_stage(stage, case), alone(stage, tuple(case.model.items()))
        for ours, theirs in zip(found, reference, strict=True):
            assert difference(ours, theirs) < TOLERANCE
    assert len(set(reference.losses)) == len(reference.losses)  # something is learnt


def test_a_wrong_mesh_would_be_seen():
    """The comparison sees a gradient that one device in eight leaves out."""
    with jax.enable_x64(True):
        reference = alone("pretrain", ())
        damaged = [x * 7 / 8 for x in reference.gradient]
        assert difference(damaged, reference.gradient) > 0.1
