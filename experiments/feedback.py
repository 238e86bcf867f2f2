"""Human feedback for the stages that learn from it: each split as tokens, and what was left out."""

import hashlib
from collections.abc import Mapping, Sequence

from configs.schema import ComparisonStageConfig
from llm.data.comparisons import EncodedFeedback, encode_feedback
from llm.data.feedback_source import load_feedback
from llm.data.packing import permutation
from llm.data.rows import tell_rows
from llm.data.tokenizers import Tokenizer


def load_comparisons(
    config: ComparisonStageConfig, tokenizer: Tokenizer, *, pairs_only: bool
) -> tuple[dict[str, list[EncodedFeedback]], list[str]]:
    """Return the feedback of each split that there is, and a line a split for the run's log.

    The lines count what was left out and name the first rows of it, with the reasons.

    Raises:
      ValueError: nothing of a split fits.
    """
    comparisons, encoded, told = config.comparisons, {}, []
    splits = ("train", "validation") if comparisons.source.has_validation else ("train",)
    for split in splits:
        found = load_feedback(comparisons, split, pairs_only=pairs_only)
        length = comparisons.length_tokens
        encoded[split], cut = encode_feedback(
            found.records, tokenizer, length, pairs_only=pairs_only
        )
        if not encoded[split]:
            raise ValueError(
                f"no {split} feedback fits into comparisons.length_tokens={length}; raise it"
            )
        if split == "validation":
            encoded[split] = _drawn(encoded[split], comparisons.max_validation_prompts)
        parts = [
            f"{split}: {len(encoded[split])} prompts; {found.num_repeated} repeats dropped",
            tell_rows(found.bad_rows, "bad rows left out"),
            tell_rows(cut, f"lost responses longer than comparisons.length_tokens={length}"),
        ]
        if pairs_only:
            parts.insert(1, f"{found.num_without_pairs} without a pair left out")
        told.append("; ".join(parts))
    return encoded, told


def feedback_digests(
    encoded: Mapping[str, Sequence[EncodedFeedback]], tokenizer: Tokenizer
) -> dict[str, str]:
    """Return what the batches are made of, by name: digests of each split's records in order."""
    found = {"tokenizer": tokenizer.digest}
    for split, records in encoded.items():
        sha256 = hashlib.sha256()
        for record in records:
            facts = (record.starts, record.levels, record.margin, [len(row) for row in record.rows])
            sha256.update(repr(facts).encode())
            for row in record.rows:
                sha256.update(row.tobytes())
        found[f"feedback ({split})"] = sha256.hexdigest()
    return found


def _drawn(records: list[EncodedFeedback], most: int | None) -> list[EncodedFeedback]:
    """Return at most so many records, the same ones for every seed of a run."""
    drawn = permutation(len(records), "held-out comparisons")[:most]
    return [records[i] for i in sorted(drawn.tolist())]
