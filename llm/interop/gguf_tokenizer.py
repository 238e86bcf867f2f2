"""The tokenizer in a GGUF file's metadata, rebuilt with `tokenizers`. Interop floor."""

from collections.abc import Callable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llm.data.tokenizers import Tokenizer

_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split_words(max_digits: str) -> pre_tokenizers.PreTokenizer:
    """Return the splitting of Llama 3 and of Qwen: they differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + max_digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _BYTES])


_ONE_DIGIT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2_WORDS])

# By the name that the file gives to its splitting of text into words (tokenizer.ggml.pre).
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2_WORDS,
    "smollm": _ONE_DIGIT,
    "starcoder": _ONE_DIGIT,
    "llama-bpe": _split_words("{1,3}"),
    "qwen2": _split_words(""),
}

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType


def tokenizer_from_metadata(get: Callable, source: str) -> Tokenizer:
    """Return the tokenizer that metadata describes; `get(key, default)` reads one key.

    Raises:
      ValueError: another kind than byte-level BPE, or a splitting into words we do not know.
    """
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"{source}: tokenizer.ggml.model={kind!r} is not supported; supported: 'gpt2' "
            "(byte-level BPE)"
        )
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{source}: tokenizer.ggml.pre={pre!r} is not supported; supported: "
            f"{', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, merges = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise ValueError(f"{source}: the metadata lacks tokenizer.ggml.tokens or .merges")
    backend = _byte_level_bpe(tokens, merges, get("tokenizer.ggml.token_type") or [], pre)
    return Tokenizer.make(backend, _settings(get, tokens))


def _settings(get: Callable, tokens: list[str]) -> dict:
    """Return what Hugging Face keeps in tokenizer_config.json."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": get("llama.context_length"),
        "chat_template": get("tokenizer.chat_template"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = get(f"tokenizer.ggml.{theirs}_token_id")
        settings[f"{ours}_token"] = None if index is None else tokens[index]
    return {key: value for key, value in settings.items() if value is not None}


def _byte_level_bpe(
    tokens: list[str], merges: list[str], types: list[int], pre: str
) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            # Llama 3 looks whole words up before it merges
            ignore_merges=pre == "llama-bpe",
        )
    )
    bpe.pre_tokenizer = _PRE_TOKENIZERS[pre]
    bpe.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    typed = list(zip(tokens, types, strict=False))
    bpe.add_special_tokens(
        [tokenizers.AddedToken(t, special=True) for t, kind in typed if kind == _CONTROL]
    )
    bpe.add_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t, kind in typed if kind == _USER_DEFINED]
    )
    return bpe
