"""The splash kernel, interpreted on the CPU, against the dense one: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.attention_kernels import attend
from llm.models.masks import AttentionPattern
from llm.models.splash import attend_splash
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh

CASES = {
    "causal, packed, grouped": AttentionPattern("causal"),
    "window": AttentionPattern("causal", window=40),
}


def inputs(batch=2, length=128, heads=2, kv=1, width=32):
    keys = jax.random.split(jax.random.key(0), 3)
    q = 2 * jax.random.normal(keys[0], (batch, length, heads, width))
    k, v = (jax.random.normal(key, (batch, kv, length, width)) for key in keys[1:])
    segments = jnp.where(jnp.arange(length) < jnp.array([[50], [100]])[:batch], 1, 2)
    return q, k, v, segments


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_dense(case):
    q, k, v, segments = inputs()
    pattern = CASES[case].replace(query_segments=segments, key_segments=segments)

    def both(q, k, v):
        ours = attend_splash(q, k, v, pattern, None, interpret=True)
        return ours, attend(q, k, v, pattern, kernel="xla")

    def gradients(which):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(both(*x)[which])), argnums=(0, 1, 2))(q, k, v)

    np.testing.assert_allclose(*jax.jit(both)(q, k, v), atol=2e-5)
    for ours, dense in zip(gradients(0), gradients(1), strict=True):
        np.testing.assert_allclose(ours, dense, atol=2e-4)


def test_splash_runs_shard_by_shard():
    q, k, v, segments = inputs(batch=2, heads=4, kv=2)
    pattern = AttentionPattern("causal", query_segments=segments, key_segments=segments)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        ours = jax.jit(lambda q, k, v: attend_splash(q, k, v, pattern, None, interpret=True))(
            q, k, v
        )
    np.testing.assert_allclose(ours, attend(q, k, v, pattern, kernel="xla"), atol=2e-5)


def test_what_splash_cannot_do_is_refused():
    q, k, v, _ = inputs(length=100)
    with pytest.raises(ValueError, match="128 divides, not 100"):
        attend(q, k, v, AttentionPattern("causal"), kernel="splash")
    with pytest.raises(ValueError, match="no ALiBi"):
        attend(q, k, v, AttentionPattern("causal", alibi_heads=2), kernel="splash")
