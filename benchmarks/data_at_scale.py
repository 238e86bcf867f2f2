"""What a group of prepared data costs: the rates that docs/data_at_10T_tokens.md computes with.

    python -m benchmarks.data_at_scale [--documents=6000000]

Lengths of documents are drawn (log-normal, median 400 tokens, mean 660, as of web text); digests
are random; what is tokenised is the speedrun's text. Seconds are a core's, not the clock's: the
last line is one JSON object of them.
"""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath

from configs.dataclass_config import from_config_dict
from configs.schema import PretrainConfig
from configs.speedrun import get_pretrain_config
from llm.data.groups import GroupKey
from llm.data.merge import DIGEST_BITS, Documents, settle
from llm.data.packing import load_pack_plan, make_pack_plan
from llm.data.prepare import prepare
from llm.data.prepared import PreparedSplit, finish_split
from llm.data.shard_writer import ShardTask, write_tokenized_shard
from llm.data.sources import open_source
from llm.data.split_rows import RowOrder
from llm.data.tokenizer_training import make_tokenizer

_DOCUMENTS = flags.DEFINE_integer("documents", 6_000_000, "Of one group.", lower_bound=10_000)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 4096, "Of the pack plan, in tokens.")
_SHARDS = 256


def main(_) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        found = tokenising(epath.Path(folder) / "shard")
        found |= group(epath.Path(folder) / "group", _DOCUMENTS.value, _ROW_LENGTH.value)
    print(json.dumps(found))


def tokenising(folder: epath.Path) -> dict[str, float]:
    """Write one shard of training text, looked up in held-out text as it goes by."""
    config = from_config_dict(get_pretrain_config(), PretrainConfig).data
    tokenizer = make_tokenizer(config)
    held_out = prepare(config, tokenizer).path / "held_out.npz"
    name, source = next(iter(config.sources.items()))
    opened = open_source(source, "train", config.cache_dir)
    task = ShardTask(name, opened, (opened.shards()[0],), folder, 0, config.max_bad_rows, held_out)
    seconds, marker = of_core(lambda: write_tokenized_shard(task, tokenizer))
    alone, _ = of_core(lambda: write_tokenized_shard(without_look_up(task), tokenizer))
    return {
        "tokenise_megabytes_per_core_second": marker["bytes"] / seconds / 1e6,
        "tokenise_bytes_per_token": marker["bytes"] / marker["tokens"],
        "tokenise_megabytes": marker["bytes"] / 1e6,
        "tokenise_held_out_megabytes_per_core_second": marker["bytes"] / alone / 1e6,
    }


def without_look_up(task: ShardTask) -> ShardTask:
    return dataclasses.replace(task, held_out_path=None, shard=1)


def group(folder: epath.Path, num_documents: int, row_length: int) -> dict[str, float]:
    """Index, plan and settle a group of drawn documents, and open it as a host does."""
    rng = np.random.default_rng(0)
    tokens = np.maximum(2, rng.lognormal(np.log(400), 1.0, num_documents)).astype(np.int64)
    columns = {
        "shard": np.sort(rng.integers(0, _SHARDS, num_documents)).astype(np.int32),
        "record": np.arange(num_documents),
        "num_tokens": tokens,
        "num_targets": tokens - 1,
        "num_bytes": 4 * tokens,
    }
    shards = [{"size": 0, "sha256": "0" * 64}] * _SHARDS
    finish_seconds, _ = of_core(
        lambda: finish_split(folder, columns, shards, "<u4", {"masked": False})
    )
    open_seconds, split = of_core(lambda: PreparedSplit(folder))
    plan_seconds, plan = of_core(lambda: make_pack_plan(split.num_pairs, row_length, 0))
    load_pack_plan(split.num_pairs, row_length, 0, folder)
    (file,) = folder.glob("plan-*.npz")
    load_seconds, _ = of_core(lambda: load_pack_plan(split.num_pairs, row_length, 0, folder))
    order = RowOrder(np.full(8, plan.num_rows), 0, windowed=True)
    order_seconds, _ = of_core(lambda: order.rows(np.zeros(1, np.int64), np.zeros(1, np.int64)))
    digests = rng.integers(0, 2**63, (num_documents, 2)).astype(np.uint64) * np.uint64(2)
    documents = Documents(GroupKey(True, "web", 0), np.arange(num_documents), digests)
    cut_seconds, parts = of_core(lambda: list(documents.by_digest(DIGEST_BITS)))
    settle_seconds, _ = of_core(lambda: settle([documents]))
    return {
        "documents": num_documents,
        "tokens": int(tokens.sum()),
        "index_bytes_per_document": (folder / "index.npz").stat().length / num_documents,
        "index_write_seconds": finish_seconds,
        "index_open_seconds": open_seconds,
        "plan_rows": plan.num_rows,
        "plan_fill_rate": plan.fill_rate,
        "plan_bytes_per_document": file.stat().length / num_documents,
        "plan_make_seconds": plan_seconds,
        "plan_load_seconds": load_seconds,
        "window_order_seconds": order_seconds,
        "digests_cut_seconds": cut_seconds,
        "digest_parts": len(parts),
        "settle_microseconds_per_document": 1e6 * settle_seconds / num_documents,
    }


def of_core(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return a core's seconds that a call takes, and what it returns."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


if __name__ == "__main__":
    app.run(main)
