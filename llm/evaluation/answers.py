"""Three scores of an answer side by side: because a jump can come from the metric. Third floor.

Source: Schaeffer et al. 2023, arXiv:2304.15004: exact match is discontinuous in what a model gives
each token, token accuracy less so, and nats not at all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def answer_scores(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """Return `exact_match`, the share of rows whose every weighted token is the likeliest, which is
    what greedy decoding gets right; `token_accuracy`, the share of those tokens; `answer_nats`, of
    all tokens of an answer together, averaged over rows; and the product of accuracies by place.

    Weights are 0 or 1; every row has an answer.
    """
    right = (jnp.argmax(logits, axis=-1) == targets) | (weights == 0)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return {
        "exact_match": jnp.mean(jnp.all(right, axis=-1)),
        "token_accuracy": jnp.sum(right * weights) / jnp.sum(weights),
        "answer_nats": -jnp.sum(chosen * weights) / weights.shape[0],
        "product_of_accuracies": _product_of_accuracies(right, weights),
    }


def _product_of_accuracies(
    right: Bool[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Return what exact match would be if tokens were right or wrong independently: the product
    over the answer's places of the share that is right there. Answers are all at one place."""
    counted = jnp.sum(weights, axis=0)
    accuracy = jnp.sum(right * weights, axis=0) / jnp.maximum(counted, 1.0)
    return jnp.prod(jnp.where(counted > 0, accuracy, 1.0))
