"""From a DataConfig to the batches of training, packed globally or online as it says.
The one place that knows both kinds."""

import os
from collections.abc import Mapping

from llm.data.config import DataConfig
from llm.data.loader import Batches, make_batches
from llm.data.online_packing import OnlineBatches, OnlineSetup
from llm.data.prepare import Prepared
from llm.data.prepared import PreparedSplit
from llm.data.sources import open_source
from llm.data.tokenizers import Tokenizer
from llm.parallel.hosts import WHOLE, HostShare


def make_training_batches(
    config: DataConfig,
    prepared: Prepared,
    tokenizer: Tokenizer,
    *,
    share: HostShare = WHOLE,
    state_dir: str | os.PathLike | None = None,
) -> Batches | OnlineBatches:
    """Return the training batches of a config, from the first row on; `seek` goes elsewhere.

    Args:
      state_dir: where online packing keeps the journal that `seek` needs.
    """
    weights = mixture_weights(config)
    if config.packing == "global":
        return make_batches(
            prepared.train, weights, config.length_tokens, config.batch_sequences, config.seed,
            host_index=share.index, host_count=share.count, unique_rows=config.unique_rows,
        )  # fmt: skip
    if weights is None:
        if len(config.sources) > 1:
            raise ValueError(
                "data.packing='online' mixes streams whose sizes are unknown: give every source "
                f"a weight ({', '.join(sorted(config.sources))})"
            )
        weights = dict.fromkeys(config.sources, 1.0)
    sources = {
        name: open_source(config.sources[name], "train", config.cache_dir)
        for name, weight in weights.items()
        if weight > 0
    }
    setup = OnlineSetup(
        config.length_tokens, config.batch_sequences, config.seed, weights,
        share.index, share.count, config.max_bad_rows,
    )  # fmt: skip
    return OnlineBatches(sources, tokenizer, setup, state_dir=state_dir, keeps_journal=share.first)


def data_digests(config: DataConfig, prepared: Prepared, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what the batches are made of, by name: a digest of each split's tokens in their order.

    Of what is packed online, and read as it comes, names and sizes of the files stand for it, or
    what the source tells of itself.
    """
    found = {"tokenizer": tokenizer.digest}
    for split in ("train", "validation"):
        for name, part in getattr(prepared, split).items():
            found[f"{name} ({split})"] = part.digest
    if config.packing == "online":
        for name, source in config.sources.items():
            found[f"{name} (train)"] = open_source(source, "train", config.cache_dir).identity()
    return found


def mixture_weights(config: DataConfig) -> dict[str, float] | None:
    """Return the sources' weights; None if none has one: each document once an epoch.

    Raises:
      ValueError: some sources have a weight and some have not.
    """
    without = [name for name, source in config.sources.items() if source.weight is None]
    if len(without) == len(config.sources):
        return None
    if without:
        raise ValueError(
            f"data.sources.{without[0]} has no weight where others have one; give it a weight, "
            "or take the others' away to read each document once an epoch"
        )
    return {name: source.weight for name, source in config.sources.items()}


def rows_per_epoch(batches: Batches | OnlineBatches) -> int:
    """Return how many rows are read before one of them is read again; 0 where nobody knows."""
    return batches.rows.num_rows(1) if isinstance(batches, Batches) else 0


def num_truncated(splits: Mapping[str, PreparedSplit], row_length: int) -> dict[str, int]:
    """Return, by source, how many conversations do not fit into a row, where there are any."""
    cut = {}
    for name, split in splits.items():
        groups = split.groups if split.manifest["masked"] else ()  # texts are never cut
        cut[name] = sum(int((g.packed_pairs(row_length) < g.num_pairs).sum()) for g in groups)
    return {name: count for name, count in cut.items() if count}
