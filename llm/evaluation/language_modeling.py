"""Loss and bits per byte of a language model on held-out text. Third floor.

Two readings: packed rows of a prepared split (cheap, in the training loop), and documents under a
sliding window (each token with context before it, for reports and `evaluate`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from llm.data.loader import Batch, make_evaluation_batches
from llm.data.prepared import PreparedSplit, StoredDocument
from llm.models.transformer import Transformer
from llm.parallel.hosts import WHOLE, HostShare, place_batch
from llm.training.loss import make_token_nats

ScoreStep = Callable[[dict, Batch], dict[str, jax.Array]]
Number = float | Float[np.ndarray, " R"]  # of one model, or of R whose parameters are stacked


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Summed nats over tokens (a document's EOS counted), and the UTF-8 bytes that they spell.

    `early` and `late` are the (nats, tokens) of targets that have little and much context: of a
    row's length, 1/16 to 1/8 and at least 7/8 in the same document before them.
    """

    nats: Number
    tokens: Number
    num_bytes: Number
    early: tuple[Number, Number] = (0.0, 0.0)
    late: tuple[Number, Number] = (0.0, 0.0)

    @property
    def loss_nats_per_token(self) -> Number:
        return _ratio(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> Number:
        return _ratio(self.nats / math.log(2), self.num_bytes)

    @property
    def in_context_score(self) -> Number:
        """Loss of late targets less that of early ones, in nats: negative where context helps.

        Source: Olsson et al. 2022, "In-context Learning and Induction Heads"; they take the 500th
        token and the 50th of 512, we the mean about either, for less noise.
        """
        return _ratio(*self.late) - _ratio(*self.early)

    def __add__(self, other: "TextScore") -> "TextScore":
        both = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
        return TextScore(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
            both(self.early, other.early),
            both(self.late, other.late),
        )


def _ratio(total: Number, count: Number) -> Number:
    return total / count if np.all(count) else total * math.nan


def make_score(model: Transformer, *, tile_tokens: int = 4096) -> ScoreStep:
    """Return (params, batch) → sums of a batch: nats and tokens, of all and of two bands."""
    token_nats = make_token_nats(model, tile_tokens=tile_tokens)

    def score(params, batch):
        nats = token_nats(params, batch)
        length, positions = nats.shape[1], batch["positions"]
        bands = {
            "": True,
            "early_": (positions >= length // 16) & (positions < length // 8),
            "late_": positions >= length - length // 8,
        }
        sums = {}
        for name, band in bands.items():
            weights = batch["loss_weights"] * band
            sums |= {f"{name}nats": jnp.sum(weights * nats), f"{name}tokens": jnp.sum(weights)}
        return sums

    return score


def make_score_step(model: Transformer, mesh: Mesh, *, tile_tokens: int = 4096) -> ScoreStep:
    """Return the jitted (params, batch) → sums of a batch that is placed on the mesh."""
    score = jax.jit(make_score(model, tile_tokens=tile_tokens))
    return lambda params, batch: score(params, place_batch(_without_cursor(batch), mesh))


def make_stacked_score_step(model: Transformer, *, tile_tokens: int = 4096) -> ScoreStep:
    """Return the jitted (params [R …], batch) → sums [R] of a batch that all models read."""
    score = jax.jit(jax.vmap(make_score(model, tile_tokens=tile_tokens), in_axes=(0, None)))
    return lambda params, batch: score(params, _without_cursor(batch))


def _without_cursor(batch: Batch) -> Batch:
    return {name: x for name, x in batch.items() if name != "cursor"}


def score_split(
    score_step: ScoreStep,
    params: dict,
    split: PreparedSplit,
    *,
    row_length: int,
    batch_sequences: int,
    max_sequences: int | None = None,
    share: HostShare = WHOLE,
) -> TextScore:
    """Score the packed rows of a held-out split, or the first `max_sequences` of its fixed shuffle.

    Bytes of a part are its share of the tokens times the split's bytes.
    """
    batches = make_evaluation_batches(
        split,
        row_length,
        batch_sequences,
        host_index=share.index,
        host_count=share.count,
    )
    sums = []
    for i, batch in enumerate(batches):
        if max_sequences is not None and i * batch_sequences >= max_sequences:
            break
        sums.append(score_step(params, batch))
    batches.close()
    total = _total(sums)
    return dataclasses.replace(total, num_bytes=total.tokens * split.bytes_per_target)


def score_splits(
    score_step: ScoreStep, params: dict, splits: Mapping[str, PreparedSplit], **kwargs
) -> dict[str, Number]:
    """Return metrics `eval/…` for each source and, where there are several, for all together.

    The in-context score is left out where no document is as long as a row.
    """
    scores = {
        name: score_split(score_step, params, split, **kwargs) for name, split in splits.items()
    }
    if len(scores) > 1:
        scores["all"] = sum(scores.values(), TextScore(0.0, 0.0, 0.0))
    metrics = {}
    for name, score in scores.items():
        metrics[f"eval/{name}/loss"] = score.loss_nats_per_token
        metrics[f"eval/{name}/bits_per_byte"] = score.bits_per_byte
        if not np.any(np.isnan(score.in_context_score)):
            metrics[f"eval/{name}/in_context_score"] = score.in_context_score
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
    total = _total([score_step(params, batch) for batch in batches])
    return TextScore(total.nats, total.tokens, float(num_bytes))


def _total(sums: list[dict[str, jax.Array]]) -> TextScore:
    """Sum in float64 on the host: float32 would lose nats over millions of tokens."""
    found = jax.device_get(sums)

    def of(name: str) -> Number:
        parts = [np.asarray(part[name], np.float64) for part in found]
        return sum(parts[1:], parts[0]) if parts and parts[0].ndim else float(sum(parts))

    bands = [(of(f"{name}nats"), of(f"{name}tokens")) for name in ("", "early_", "late_")]
    return TextScore(*bands[0], 0.0, *bands[1:])


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
