"""Loss and bits per byte of a language model on held-out text. Third floor.

Two readings: packed rows of a prepared split (cheap, in the training loop), and documents under a
sliding window (each token with context before it, for reports and `evaluate`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from llm.data.loader import Batch, make_evaluation_batches
from llm.data.prepared import PreparedSplit, StoredDocument
from llm.models.transformer import Transformer
from llm.training.loss import make_causal_lm_loss
from llm.training.step import place_batch

ScoreStep = Callable[[dict, Batch], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Summed nats over tokens (a document's EOS counted), and the UTF-8 bytes that they spell."""

    nats: float
    tokens: float
    num_bytes: float

    @property
    def loss_nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(
            self.nats + other.nats, self.tokens + other.tokens, self.num_bytes + other.num_bytes
        )


def make_score_step(model: Transformer, mesh: Mesh, *, tile_tokens: int = 4096) -> ScoreStep:
    """Return the jitted (params, batch) → sums of a batch: loss in nats, tokens, correct."""
    loss_fn = make_causal_lm_loss(model, tile_tokens=tile_tokens)
    score = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])

    def step(params, batch):
        arrays = {name: x for name, x in batch.items() if name != "cursor"}
        return score(params, place_batch(arrays, mesh))

    return step


def score_split(
    score_step: ScoreStep,
    params: dict,
    split: PreparedSplit,
    *,
    row_length: int,
    batch_sequences: int,
    max_sequences: int | None = None,
) -> TextScore:
    """Score the packed rows of a held-out split, or the first `max_sequences` of its fixed shuffle.

    Bytes of a part are its share of the tokens times the split's bytes.
    """
    batches = make_evaluation_batches(
        split,
        row_length,
        batch_sequences,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )
    sums = []
    for i, batch in enumerate(batches):
        if max_sequences is not None and i * batch_sequences >= max_sequences:
            break
        sums.append(score_step(params, batch))
    batches.close()
    nats, tokens = _total(sums)
    bytes_per_token = float(split.num_bytes.sum()) / max(1, int(split.num_targets.sum()))
    return TextScore(nats, tokens, tokens * bytes_per_token)


def score_splits(
    score_step: ScoreStep, params: dict, splits: Mapping[str, PreparedSplit], **kwargs
) -> dict[str, float]:
    """Return metrics `eval/…` for each source and, where there are several, for all together."""
    scores = {
        name: score_split(score_step, params, split, **kwargs) for name, split in splits.items()
    }
    if len(scores) > 1:
        scores["all"] = sum(scores.values(), TextScore(0.0, 0.0, 0.0))
    metrics = {}
    for name, score in scores.items():
        metrics[f"eval/{name}/loss"] = score.loss_nats_per_token
        metrics[f"eval/{name}/bits_per_byte"] = score.bits_per_byte
    return metrics


def score_documents(
    score_step: ScoreStep,
    params: dict,
    documents: Iterable[StoredDocument],
    *,
    row_length: int,
    batch_tokens: int,
    stride: int | None = None,
) -> TextScore:
    """Score documents, or what is to be learnt of them, through a window of row_length tokens.

    The window moves by `stride` (default: half of it); each target is scored once, with at least
    row_length − stride tokens before it wherever the document has them.
    """
    stride = stride or max(1, row_length // 2)
    num_bytes, windows = 0, []
    for document in documents:
        num_bytes += document.num_bytes
        windows.extend(_windows(document, row_length, stride))
    batches = _window_batches(windows, row_length, batch_tokens)
    nats, tokens = _total([score_step(params, batch) for batch in batches])
    return TextScore(nats, tokens, float(num_bytes))


def _total(sums: list[dict[str, jax.Array]]) -> tuple[float, float]:
    """Sum in float64 on the host: float32 would lose nats over millions of tokens."""
    sums = jax.device_get(sums)
    return sum(float(s["loss"]) for s in sums), sum(float(s["tokens"]) for s in sums)


def _windows(
    document: StoredDocument, row_length: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tokens of a window and its last target, weights of the targets): those at the end."""
    tokens = np.asarray(document.tokens, np.int32)
    mask = np.ones(len(tokens)) if document.loss_mask is None else np.asarray(document.loss_mask)
    num_pairs, done = len(tokens) - 1, 0
    while done < num_pairs:
        end = min(num_pairs, row_length if done == 0 else done + stride)
        start = max(0, end - row_length)
        weights = np.where(np.arange(start, end) >= done, mask[start + 1 : end + 1], 0.0)
        if weights.any():
            yield tokens[start : end + 1], weights
        done = end


def _window_batches(windows: list, row_length: int, batch_tokens: int) -> Iterator[Batch]:
    """Yield batches of windows of like length: one of few shapes, so that few are compiled."""
    windows = sorted(windows, key=lambda w: len(w[0]))
    while windows:
        longest = len(windows[-1][0]) - 1
        length = row_length
        while length // 2 >= max(longest, 16):
            length //= 2
        count = max(1, batch_tokens // length)
        yield _fill([windows.pop() for _ in range(min(count, len(windows)))], count, length)


def _fill(windows: list, count: int, length: int) -> Batch:
    batch = {
        name: np.zeros((count, length), np.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["loss_weights"] = np.zeros((count, length), np.float32)
    for row, (tokens, weights) in enumerate(windows):
        n = len(tokens) - 1
        batch["tokens"][row, :n] = tokens[:-1]
        batch["targets"][row, :n] = tokens[1:]
        batch["segment_ids"][row, :n] = 1
        batch["positions"][row, :n] = np.arange(n)
        batch["loss_weights"][row, :n] = weights
    return batch
