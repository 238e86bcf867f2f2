"""Configs of the data package: where text comes from, how it is tokenised, how it is batched.
Plain frozen dataclasses; importing them imports neither JAX nor any reader."""

import dataclasses
import os
import pathlib
from typing import Literal, get_args

from llm.parallel.checks import LARGEST, check_names, check_ranges

SourceKind = Literal["tfds", "files", "huggingface"]
TokenizerKind = Literal["train", "file", "bytes", "gpt2"]
Packing = Literal["global", "online"]
RowFormat = Literal["text", "messages", "prompt_response", "feedback"]
FeedbackKind = Literal["auto", "comparison", "ranking", "rating", "thumbs", "correction"]


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One corpus: a TFDS data set, plain files, or a Hugging Face data set."""

    kind: SourceKind = "files"
    # TFDS: "english_prose", "film_reviews/reviews", any "name/config:version".
    # Hugging Face: "owner/name" or "owner/name:config". Unused by files.
    name: str = ""
    # Globs of .jsonl, .txt, .parquet files, each also .gz .bz2 .xz .zst; local or gs:// paths.
    paths: tuple[str, ...] = ()
    # Files to validate on; empty = held out of `paths` (see validation_fraction).
    validation_paths: tuple[str, ...] = ()
    split: str = "train"
    # Split to validate on; "" = hold out `validation_fraction` of the groups of `split`.
    validation_split: str = ""
    # Share of groups held out, chosen by a hash of the group: stable when documents are added.
    validation_fraction: float = 0.02
    # A row is a text; a list of chat turns; a prompt and its response; or human feedback, whose
    # fields are its kind's. Of a conversation only the assistant's turns are learnt.
    format: RowFormat = "text"
    text_field: str = "text"
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    context_field: str = ""  # what the prompt is about, put below it; "" = nothing
    response_field: str = "response"
    system_message: str = ""  # before conversations that have none
    kept_fields: tuple[str, ...] = ()  # others to be read: an answer that rewards check, perhaps
    # Field that names what must not be cut by a split (a work, a film, a package);
    # "" = each document, or prompt of a conversation, by itself.
    group_field: str = ""
    # A longer document is a bad row: one runaway file should not fill the memory.
    max_document_bytes: int = 64 * 1024 * 1024
    # Share of the mixture, relative to the other sources' weights. None (in every source):
    # each document once an epoch, so that sources count by their size.
    weight: float | None = None

    def __post_init__(self) -> None:
        _check_choice("source kind", self.kind, get_args(SourceKind))
        _check_choice("source format", self.format, get_args(RowFormat))
        check_ranges(
            self, not_negative="weight", size="max_document_bytes", below_one="validation_fraction"
        )

    @property
    def has_validation(self) -> bool:
        """Whether there is text to validate on: a split, files, or a held-out share."""
        named = self.validation_paths if self.kind == "files" else self.validation_split
        return bool(named) or self.validation_fraction > 0


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer: trained on the data here, loaded from a file, raw bytes, or GPT-2's."""

    kind: TokenizerKind = "train"
    # For "file": a tokenizer.json, or a directory that holds one (a workdir's tokenizer too).
    path: str = ""
    # For "train": entries in all, special tokens included.
    vocab_size: int = 8192
    # For "train": text read from each source at most, the same share of each of its shards.
    max_train_bytes_per_source: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        _check_choice("tokenizer kind", self.kind, get_args(TokenizerKind))
        if self.kind == "file" and not self.path:
            raise ValueError('tokenizer kind "file" needs tokenizer.path; it is empty')
        check_ranges(
            self,
            section="tokenizer.",
            size="vocab_size",
            within={"max_train_bytes_per_source": "[1, inf)"},
        )


@dataclasses.dataclass(frozen=True)
class ComparisonsConfig:
    """Human feedback as batches: prompts with several responses each, better and worse ones."""

    source: SourceConfig = SourceConfig(format="feedback")
    kind: FeedbackKind = "auto"  # by the fields of each row
    field_names: dict[str, str] = dataclasses.field(default_factory=dict)  # theirs by ours
    length_tokens: int = 512  # of prompt and response; what is longer is left out and counted
    batch_prompts: int = 8  # of the global batch, over all hosts
    max_responses: int = 4  # a prompt; of more, each epoch draws so many
    max_validation_prompts: int | None = None  # drawn of those held out; None: all
    pad_left: bool = False
    max_bad_rows: int = 100
    seed: int = 0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        _check_choice("comparisons.kind", self.kind, get_args(FeedbackKind))
        if self.source.format != "feedback":
            raise ValueError(
                f"comparisons.source.format is {self.source.format!r}; it must be feedback"
            )
        check_ranges(
            self,
            section="comparisons.",
            size="batch_prompts max_validation_prompts",
            count="max_bad_rows",
            seed="seed",
            within=dict.fromkeys(("length_tokens", "max_responses"), f"[2, {LARGEST}]"),
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything between raw text and batches of packed rows."""

    # A mixture by name: `--config.data.sources.code.weight=0.3`.
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    length_tokens: int = 1024
    # Rows of the global batch, over all hosts.
    batch_sequences: int = 8
    # "global": every document once an epoch, whatever the hosts. "online": for endless streams,
    # packed as they come, bound to the number of hosts.
    packing: Packing = "global"
    # Seed of the order of documents and rows; apart from the model's seed.
    seed: int = 0
    # Train on so many packed rows only, drawn once, however long the run: repeated data. None: all.
    unique_rows: int | None = None
    # Bad rows skipped per source before preparation stops.
    max_bad_rows: int = 100
    # Share of held-out documents that may (nearly) occur in training before preparation fails.
    max_overlap_fraction: float = 0.01
    # Where prepared data lies; "" = $LLM_CACHE, or ~/.cache/ontogeny-llm.
    cache_dir: str = ""
    # Processes that tokenise; 0 = in this process.
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check_choice("data.packing", self.packing, get_args(Packing))
        check_ranges(
            self,
            section="data.",
            size="length_tokens batch_sequences unique_rows",
            seed="seed",
            count="max_bad_rows",
            share="max_overlap_fraction",
            within={"num_workers": "[0, 10000]"},
        )
        check_names(self.sources, "data.sources")
        if self.unique_rows is not None and self.packing == "online":
            raise ValueError(f"data.unique_rows={self.unique_rows}: data.packing must be global")
        chats = [name for name, source in self.sources.items() if source.format != "text"]
        if chats and self.packing == "online":
            raise ValueError(f"data.sources.{chats[0]} holds conversations: packing must be global")


def cache_root(cache_dir: str = "") -> pathlib.Path:
    """Return where downloads and prepared data lie: `cache_dir`, else $LLM_CACHE, else ~/.cache."""
    chosen = cache_dir or os.environ.get("LLM_CACHE") or "~/.cache/ontogeny-llm"
    return pathlib.Path(chosen).expanduser().absolute()
