"""Optimizers from optax, told by the logical axes which parameter is what. Second floor."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from llm.models.adapters import is_factor
from llm.training.config import OptimizerConfig

_STACKED = "cycle"  # the subtree whose arrays carry the layers on axis 0


def make_optimizer(config: OptimizerConfig, axes: dict) -> optax.GradientTransformation:
    """Return the optimizer at learning rate 1; the train step scales its updates by the schedule.

    `axes` are the model's logical axes: they, not an array's rank, say what is a matrix, since
    layers are stacked. Clipping is the train step's.
    """
    decay = jax.tree_util.tree_map_with_path(
        lambda path, _: _decays(path, config.decay_embeddings), axes, is_leaf=_is_axes
    )
    match config.name:
        case "adamw":
            return optax.adamw(
                1.0,
                config.beta1,
                config.beta2,
                config.epsilon,
                weight_decay=config.weight_decay,
                mask=decay,
            )
        case "lion":
            return optax.lion(
                1.0, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay
            )
        case "adafactor":
            return _each_layer_apart(
                optax.adafactor(
                    1.0,
                    multiply_by_parameter_scale=False,
                    decay_rate=0.8,
                    weight_decay_rate=config.weight_decay or None,
                    weight_decay_mask=lambda tree: jax.tree_util.tree_map_with_path(
                        lambda path, _: _decays(path, config.decay_embeddings), tree
                    ),
                )
            )
        case "muon":
            return _muon(config, axes, decay)


def _muon(config: OptimizerConfig, axes: dict, decay: dict) -> optax.GradientTransformation:
    """Return Muon for the matrices inside layers and AdamW for the rest.

    Decay comes after both: optax's own would shrink norms and biases too, which have no mask there.
    """
    dimensions = muon_dimensions(axes)
    adam_rate = config.adam_learning_rate / config.learning_rate
    by_muon = jax.tree.map(
        lambda numbers: numbers is not None, dimensions, is_leaf=lambda x: not isinstance(x, dict)
    )
    decay_muon = jax.tree.map(lambda decays, ours: decays and ours, decay, by_muon)
    decay_adam = jax.tree.map(lambda decays, ours: decays and not ours, decay, by_muon)
    return optax.chain(
        muon(
            1.0,
            beta=config.beta1,
            eps=config.epsilon,
            adam_b1=config.adam_beta1,
            adam_b2=config.beta2,
            adam_learning_rate=adam_rate,
            muon_weight_dimension_numbers=dimensions,
        ),
        optax.add_decayed_weights(-config.weight_decay, decay_muon),
        optax.add_decayed_weights(-config.weight_decay * adam_rate, decay_adam),
    )


def muon_dimensions(axes: dict) -> dict:
    """Return, for each parameter, the dimensions that Muon multiplies out; None: left to AdamW.

    Matrices inside layers are Muon's: each has the residual width ("embed") on one side and its
    heads or features on the other; the layer axis is neither, so every layer is its own matrix.
    """

    def one(path, names):
        inside = {n for n in names if n != "layers"}
        if path[-1].key != "kernel" or "vocab" in inside or "embed" not in inside:
            return None
        width = tuple(i for i, n in enumerate(names) if n == "embed")
        other = tuple(i for i, n in enumerate(names) if n not in ("embed", "layers"))
        first = min(width) < min(other)
        return MuonDimensionNumbers(*((width, other) if first else (other, width)))

    return jax.tree_util.tree_map_with_path(one, axes, is_leaf=_is_axes)


def _decays(path, embeddings: bool) -> bool:
    """Kernels and their low-rank factors decay; scales and biases do not; embeddings as asked."""
    name = path[-1].key
    return name == "kernel" or is_factor(name) or (name == "embedding" and embeddings)


def _is_axes(x) -> bool:
    return isinstance(x, tuple)


def _each_layer_apart(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run an optimizer whose statistics span whole arrays on each stacked layer by itself."""

    def mapped(fn, name):
        return jax.vmap(fn) if name == _STACKED else fn

    def init(params):
        return {name: mapped(tx.init, name)(part) for name, part in params.items()}

    def update(updates, state, params):
        done = {
            name: mapped(tx.update, name)(updates[name], state[name], params[name])
            for name in params
        }
        return {k: v[0] for k, v in done.items()}, {k: v[1] for k, v in done.items()}

    return optax.GradientTransformation(init, update)
