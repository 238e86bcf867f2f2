"""Which layers attend to all positions and which to a window, from config.json. Interop floor."""

from llm.parallel.checks import shown


def count_layers(theirs: dict) -> int:
    """Return how many layers there are: lists as long are made of it."""
    count = theirs["num_hidden_layers"]
    if not isinstance(count, int) or not 1 <= count <= 1000:
        raise ValueError(f"num_hidden_layers={shown(count)}: must be in [1, 1000]")
    return count


def windows(theirs: dict) -> dict:
    """Return the fields that say which of Qwen's layers see a sliding window, and how wide."""
    names = {"full_attention": "global", "sliding_attention": "local"}
    num_layers, window = count_layers(theirs), theirs.get("sliding_window")
    if not theirs.get("use_sliding_window", False):
        window = None
    types = theirs.get("layer_types")
    if types is None:
        full = theirs.get("max_window_layers", 28) if window else num_layers
        types = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    if len(types) != num_layers or not set(types) <= names.keys():
        raise ValueError(
            f"layer_types={shown(types)} must name one of {', '.join(names)} for each of the "
            f"{num_layers} layers"
        )
    if "sliding_attention" not in types:
        return {}
    if not window:
        raise ValueError(
            "layer_types asks for sliding_attention, but use_sliding_window and sliding_window do "
            "not say how wide the window is"
        )
    return {"kinds": tuple(names[kind] for kind in types), "sliding_window_tokens": window}


def fold(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (prefix, cycle) with prefix + cycle·n = kinds, as short as can be together."""
    for total in range(1, len(kinds) + 1):
        for prefix in range(total):
            cycle, rest = total - prefix, kinds[prefix:]
            if len(rest) % cycle == 0 and rest == rest[:cycle] * (len(rest) // cycle):
                return kinds[:prefix], rest[:cycle]
    raise ValueError("the model has no layers")
