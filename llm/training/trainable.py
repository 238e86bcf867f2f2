"""Which parameters a stage changes, and how fast each does. Second floor.

Patterns are globs over names with every layer by itself, as if none were stacked, such as
layers/3/attention/query/kernel, embedder/embedding, final_norm/scale, head/kernel.
"""

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.models.adapters import is_factor
from llm.models.config import TransformerConfig
from llm.training.config import TrainableConfig

# By parameter, what its updates are multiplied by: a number, or one a layer where they are stacked.
Rates = dict[str, Any]


def make_rates(
    config: TrainableConfig, model: TransformerConfig, shapes: dict, *, adapted: bool = False
) -> Rates:
    """Return the factor of every parameter's learning rate; 0: it is frozen.

    `shapes` are the parameters' (`param_shapes`). With an adapter (`adapted`) and no `train`
    patterns, low-rank factors and scalar heads learn and the rest is frozen. Stored kernels always
    are.

    Raises:
      ValueError: a pattern matches no parameter, or nothing is left to train.
    """
    names: list[str] = []

    def one(path, leaf):
        ours = _layer_names([entry.key for entry in path], model)
        names.extend(ours)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or path[-1].key == "kernel_scale":
            return 0.0
        rates = [_rate(config, name, model.num_layers, adapted) for name in ours]
        if len(set(rates)) == 1:
            return rates[0]
        return np.asarray(rates, np.float32).reshape(-1, *(1,) * (len(leaf.shape) - 1))

    rates = jax.tree_util.tree_map_with_path(one, shapes)
    for pattern in (*config.train, *config.freeze, *config.rates):
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"trainable: {pattern!r} matches no parameter; there are {', '.join(near)} …"
            )
    if not any(np.any(rate) for rate in jax.tree.leaves(rates)):
        raise ValueError("trainable: every parameter is frozen; nothing would be learnt")
    return rates


def split(tree: dict, rates: Rates | None) -> tuple[dict, dict]:
    """Return the trainable and the frozen part of a tree like the parameters."""
    if rates is None:
        return tree, {}
    return _part(tree, rates, np.any), _part(tree, rates, lambda rate: not np.any(rate))


def overlay(params: dict, part: dict) -> dict:
    """Return parameters of which this part is replaced: with `split`'s two halves, the whole."""
    whole = dict(params)
    for name, node in part.items():
        whole[name] = overlay(params.get(name, {}), node) if isinstance(node, dict) else node
    return whole


def _part(tree: dict, rates: Rates, wanted: Callable[[Any], Any]) -> dict:
    part = {}
    for name, node in tree.items():
        if isinstance(rates[name], dict):
            inner = _part(node, rates[name], wanted)
            if inner:
                part[name] = inner
        elif wanted(rates[name]):
            part[name] = node
    return part


def _layer_names(path: Sequence[str], model: TransformerConfig) -> list[str]:
    """Return the parameter's name, or one a layer where layers are stacked."""
    first = len(model.prefix_layers)
    for i, part in enumerate(path):
        before, after = "/".join((*path[:i], "layers")), "/".join(path[i + 1 :])
        if part.startswith("prefix_"):
            return [f"{before}/{part.removeprefix('prefix_')}/{after}"]
        if part == "cycle":
            place, after = int(path[i + 1].removeprefix("layer_")), "/".join(path[i + 2 :])
            each = len(model.cycle_layers)
            return [f"{before}/{first + c * each + place}/{after}" for c in range(model.num_cycles)]
    return ["/".join(path)]


def _rate(config: TrainableConfig, name: str, num_layers: int, adapted: bool) -> float:
    matches = lambda patterns: any(fnmatch.fnmatchcase(name, p) for p in patterns)  # noqa: E731
    if config.train:
        trained = matches(config.train)
    else:
        parts = name.split("/")
        trained = not adapted or is_factor(parts[-1]) or parts[-2] == "score"
    if not trained or matches(config.freeze):
        return 0.0
    rate = config.layer_decay ** _depth(name, num_layers)
    for pattern, factor in config.rates.items():
        rate *= factor if fnmatch.fnmatchcase(name, pattern) else 1.0
    return rate


def _depth(name: str, num_layers: int) -> int:
    """Return how many steps of layer decay a parameter gets: 0 the head, 1 the top layer, …"""
    parts = name.split("/")
    if "layers" in parts:
        return num_layers - int(parts[parts.index("layers") + 1])
    return num_layers + 1 if any(part.endswith("embedder") for part in parts) else 0
