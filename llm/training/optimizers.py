"""Optimizers from optax, told by the logical axes which parameter is what. Second floor."""

import jax
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers

from llm.models.adapters import is_factor
from llm.training.config import OptimizerConfig
from llm.training.muon import STACKED, muon_with_adam


def make_optimizer(
    config: OptimizerConfig,
    axes: dict,
    *,
    weight_decay: ArrayLike | None = None,
    width_ratio: float | None = None,
) -> optax.GradientTransformation:
    """Return the optimizer at learning rate 1; the train step scales its updates by the schedule.

    `axes` are the model's logical axes: they, not an array's rank, say what is a matrix, since
    layers are stacked. Clipping is the train step's. A `weight_decay`, which may be traced,
    replaces the config's.

    With a `width_ratio`, a model's width over its muP base's, updates of matrices inside layers are
    muP's: Adam's, Lion's and Adafactor's divided by the ratio, their decay not, as in the authors'
    MuAdamW; Muon's of spectral norm sqrt(fan out / fan in).

    Source: Yang et al. 2022, arXiv:2203.03466, table 8 and appendix B.3; Yang, Simon & Bernstein
    2023, arXiv:2310.17813, section 3 for Muon.
    """
    weight_decay = config.weight_decay if weight_decay is None else weight_decay
    decay = jax.tree_util.tree_map_with_path(
        lambda path, _: _decays(path, config.decay_embeddings), axes, is_leaf=_is_axes
    )
    match config.name:
        case "muon":
            return muon_with_adam(
                config,
                axes,
                muon_dimensions(axes),
                decay,
                weight_decay,
                spectral=width_ratio is not None,
            )
        case "adamw":
            direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
        case "lion":
            direction = optax.scale_by_lion(config.beta1, config.beta2)
        case "adafactor":
            adafactor = optax.adafactor(1.0, multiply_by_parameter_scale=False, decay_rate=0.8)
            direction = optax.chain(_each_matrix_apart(adafactor, axes), optax.scale(-1.0))
    if width_ratio is not None:
        direction = optax.chain(direction, _divide_matrices(axes, width_ratio))
    return optax.chain(direction, optax.add_decayed_weights(weight_decay, decay), optax.scale(-1.0))


def _divide_matrices(axes: dict, width_ratio: float) -> optax.GradientTransformation:
    """Divide the updates of matrices inside layers, whose fan in grows as the width does."""
    factors = jax.tree_util.tree_map_with_path(
        lambda path, names: 1 / width_ratio if _is_matrix(path, names) else 1.0,
        axes,
        is_leaf=_is_axes,
    )
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))


def muon_dimensions(axes: dict) -> dict:
    """Return, for each parameter, the dimensions that Muon multiplies out; None: left to AdamW.

    Matrices inside layers are Muon's: each has the residual width ("embed") on one side and its
    heads or features on the other; the axes of layers and experts are neither, so that the matrix
    of each is its own.
    """

    def one(path, names):
        if not _is_matrix(path, names):
            return None
        width = tuple(i for i, n in enumerate(names) if n == "embed")
        other = tuple(i for i, n in enumerate(names) if n not in ("embed", *STACKED))
        first = min(width) < min(other)
        return MuonDimensionNumbers(*((width, other) if first else (other, width)))

    return jax.tree_util.tree_map_with_path(one, axes, is_leaf=_is_axes)


def _is_matrix(path, names: tuple[str | None, ...]) -> bool:
    """Whether a parameter is a matrix inside a layer: a kernel with the residual width on one side
    and on the other what grows with it, unlike a vocabulary or a router's experts."""
    grows = "vocab" not in names and "router" not in names
    return path[-1].key == "kernel" and "embed" in names and grows


def _decays(path, embeddings: bool) -> bool:
    """Kernels and their low-rank factors decay; scales and biases do not; embeddings as asked."""
    name = path[-1].key
    return name == "kernel" or is_factor(name) or (name == "embedding" and embeddings)


def _is_axes(x) -> bool:
    return isinstance(x, tuple)


def _each_matrix_apart(
    tx: optax.GradientTransformation, axes: dict
) -> optax.GradientTransformation:
    """Run an optimizer whose statistics span whole arrays on each layer and expert by itself."""

    def mapped(stacked: str) -> optax.GradientTransformation:
        init, update = tx
        for _ in stacked.split():
            init, update = jax.vmap(init), jax.vmap(update)
        return optax.GradientTransformation(init, update)

    labels = jax.tree.map(
        lambda names: " ".join(n for n in names if n in STACKED), axes, is_leaf=_is_axes
    )
    return optax.partition({name: mapped(name) for name in jax.tree.leaves(labels)}, labels)
