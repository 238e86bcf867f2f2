"""muP's multipliers folded into parameters, where a format has none. Interop floor."""

import dataclasses

import jax

from llm.models.config import TransformerConfig


def fold_mup(config: TransformerConfig, params: dict) -> tuple[TransformerConfig, dict]:
    """Return the same function without multipliers: the head's and the routers' in their kernels,
    attention's in the query's kernel, or its norm. Without muP both come back as they are.

    Raises:
      ValueError: the head is tied, so that its multiplier would scale the lookup too.
    """
    ratio = config.width_ratio
    if ratio is None:
        return config, params
    if config.tied_head and ratio != 1.0:
        raise ValueError(
            f"muP divides the logits by {ratio:g}, which a tied head cannot hold in its weights: "
            "train with model.tied_head=False to export"
        )
    factor = (
        (config.mup_base_head_dim / config.head_dim) ** 0.5 if config.mup_base_head_dim else 1.0
    )
    scaled = "query_norm" if config.qk_norm else "query"

    def one(path, leaf):
        names = [entry.key for entry in path]
        if names[0] == "head" or "router" in names:
            return leaf / ratio
        return leaf * factor if scaled in names else leaf

    plain = dataclasses.replace(config, mup_base_width=None, mup_base_head_dim=None)
    return plain, jax.tree_util.tree_map_with_path(one, params)
