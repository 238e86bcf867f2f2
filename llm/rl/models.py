"""The models of a policy-gradient run: policy, reference, value; and what they share. Third floor.

Trained parameters are {"policy": …, "value": …}, the value only where the algorithm has one. With
an adapter all three stand on one frozen trunk: the policy's tree holds it, the value's has but its
own factors and head, and the reference is the policy without its factors.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from llm.models.adapters import is_factor
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer
from llm.training.state import ParamSpec, param_spec
from llm.training.trainable import Rates, overlay


class Models(NamedTuple):
    """Modules without parameters; `value` is None where no value is learnt."""

    policy: Transformer
    value: ScalarModel | None

    @property
    def shared(self) -> bool:
        """Whether reference and value stand on the policy's trunk."""
        return self.policy.adapter.rank > 0

    @property
    def reference(self) -> Transformer:
        """The reference's module: the policy's, without factors."""
        plain = dataclasses.replace(self.policy.adapter, rank=0)
        return self.policy.clone(adapter=plain)

    def spec(self) -> ParamSpec:
        """Return axes and shapes of what is trained."""
        policy = param_spec(self.policy)
        if self.value is None:
            return ParamSpec({"policy": policy.axes}, {"policy": policy.shapes})
        value = param_spec(self.value)
        if self.shared:
            value = ParamSpec(*(own_part(tree) for tree in value))
        return ParamSpec(*({"policy": p, "value": v} for p, v in zip(policy, value, strict=True)))

    def check_rates(self, rates: Rates | None) -> None:
        """Raise a ValueError where what a shared reference stands on would learn."""
        if not self.shared:
            return
        leaves = jax.tree_util.tree_leaves_with_path((rates or self.spec().shapes)["policy"])
        for path, rate in leaves:
            if not is_factor(path[-1].key) and (rates is None or np.any(rate)):
                name = "/".join(entry.key for entry in path)
                raise ValueError(
                    f"trainable.train lets the policy's {name} learn: with adapter.rank="
                    f"{self.policy.adapter.rank} the reference stands on it and would move along. "
                    "Let only low-rank factors ('*/lora_?') and scores learn, or set adapter.rank=0"
                )

    def reference_params(self, params: dict, frozen: dict) -> dict:
        """Return the reference's parameters, out of the policy's or of what is kept frozen."""
        if self.shared:
            return _without_factors(params["policy"])
        return frozen.get("reference", {})

    def value_params(self, params: dict) -> dict:
        """Return the value's parameters, completed with the policy's trunk where it has none."""
        value = params["value"]
        if not self.shared:
            return value
        trunk = {name: part for name, part in params["policy"].items() if name != "head"}
        return {**value, "trunk": overlay(trunk, value["trunk"])}


def own_part(value: dict) -> dict:
    """Return what a value on a shared trunk has of its own: factors, and the score's head."""
    return {"trunk": _only_factors(value["trunk"]), "score": value["score"]}


def _only_factors(tree: dict) -> dict:
    kept = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            inner = _only_factors(node)
            if inner:
                kept[name] = inner
        elif is_factor(name):
            kept[name] = node
    return kept


def _without_factors(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return jax.lax.stop_gradient(tree)
    return {name: _without_factors(node) for name, node in tree.items() if not is_factor(name)}
