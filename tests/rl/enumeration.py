"""The shipped experience and loss over all responses there are, weighted by their probabilities:
what comes out is the expectation itself."""

import jax
import jax.numpy as jnp
import numpy as np

from llm.rl.experience import Looks, make_experience
from llm.rl.forward import Said
from llm.rl.loss import minibatch_loss
from llm.rl.rollout import Rollout
from llm.rl.state import init_controllers
from tests.rl.tabular import ALL


def expected_loss(
    said, reference, scores, probs, algorithm, kl, *, mask=ALL.mask, learnt=1.0, coefficient=None
):
    """Return the expected loss of a step that samples by `probs` what `said` is of, on policy.

    Groups are all pairs of responses. A weight of tokens `learnt` and another KL coefficient make
    mistakes.
    """
    group = 2 if algorithm.name in ("rloo", "grpo") else 1
    count = len(probs)
    rows = np.indices((count,) * group).reshape(group, -1).T.ravel()
    weights = jnp.repeat(jnp.prod(probs[rows].reshape(-1, group), axis=1), group)
    weights = jax.lax.stop_gradient(weights)[:, None] * jnp.broadcast_to(learnt, mask.shape)[rows]
    mask = jnp.asarray(mask)[rows]
    said = Said(*(x[rows] for x in said))
    rollout = Rollout(
        tokens=None,
        segment_ids=None,
        positions=None,
        mask=mask,
        sampler_log_probs=said.log_probs,
        lengths=jnp.sum(mask, axis=1).astype(jnp.int32),
        finished=jnp.ones(len(rows), bool),
    )
    coefficient = jnp.float32(kl.coefficient if coefficient is None else coefficient)
    controllers = init_controllers(0.0).replace(
        kl_coefficient=coefficient, baseline=jnp.float32(0.5), responses=jnp.float32(8)
    )
    looks = jax.lax.stop_gradient(Looks(said.log_probs, reference[rows], said.values))
    experience, _, _ = make_experience(
        rollout, looks, scores[rows], controllers, algorithm, kl, group
    )
    weighted = experience.mask * weights
    loss, _ = minibatch_loss(
        said,
        experience._replace(mask=weighted),
        weighted,
        algorithm,
        kl,
        coefficient,
        is_first=True,
    )
    return loss
