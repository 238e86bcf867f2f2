"""Rotary settings as config.json spells them, to our fields and back. Interop floor."""

from llm.models.config import TransformerConfig

_SUPPORTED = "default, linear, llama3"


def rope_from_huggingface(theirs: dict) -> dict:
    """Return our rope_* fields from either spelling: `rope_scaling`, or transformers 5's
    `rope_parameters`.

    Raises:
      ValueError: a kind of scaling that our models do not have.
    """
    # transformers reads them in this order, too
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters differ by layer type; supported: one setting for all")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor={partial} is not supported; only 1.0 is")
    theta = rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    fields = {"rope_theta": float(theta)}
    match kind:
        case "default":
            return fields
        case "linear":
            return fields | {"rope_scaling": "linear", "rope_factor": float(rope["factor"])}
        case "llama3":
            original = rope.get("original_max_position_embeddings")
            return fields | {
                "rope_scaling": "llama3",
                "rope_factor": float(rope["factor"]),
                "rope_low_frequency_factor": float(rope["low_freq_factor"]),
                "rope_high_frequency_factor": float(rope["high_freq_factor"]),
                "rope_original_length_tokens": original or theirs["max_position_embeddings"],
            }
    raise ValueError(f"rope type {kind!r} is not supported; supported: {_SUPPORTED}")


def rope_to_huggingface(config: TransformerConfig) -> dict:
    """Return the rotary keys of config.json, in both spellings so that any reader finds its own."""
    scaling = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low_frequency_factor,
            "high_freq_factor": config.rope_high_frequency_factor,
            "original_max_position_embeddings": config.rope_original_length_tokens,
        }
    parameters = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
    }
