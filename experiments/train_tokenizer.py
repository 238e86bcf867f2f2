"""Train a tokenizer on a recipe's text, and say what it does with held-out text, beside GPT-2's.

    python -m experiments.train_tokenizer --config=configs/pretrain_tiny.py --output=runs/tokenizer

The vocabulary's size is `--config.data.tokenizer.vocab_size`; a recipe then uses the tokenizer with
`--config.data.tokenizer.kind=file --config.data.tokenizer.path=runs/tokenizer`.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from configs.schema import PretrainConfig
from experiments import entry
from llm.data.packages import PackageError
from llm.data.tokenizer_training import (
    bytes_per_token,
    find_unfaithful,
    gpt2_tokenizer,
    make_tokenizer,
    read_texts,
)

_OUTPUT = flags.DEFINE_string("output", None, "Directory for the tokenizer.", required=True)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", 4_000_000, "Text of each source that the report is measured on, at most."
)
_JSON = entry.define_json()


def main(config: PretrainConfig) -> None:
    tokenizer = make_tokenizer(config.data)
    tokenizer.save(_OUTPUT.value)

    compared = {"this": tokenizer}
    try:
        compared["gpt2"] = gpt2_tokenizer(config.data.cache_dir)
    except PackageError as error:
        Console(stderr=True).print(f"without GPT-2's tokenizer: {error}", style="yellow")

    corpora, unfaithful = {}, find_unfaithful(tokenizer, _all_characters())
    for name, source in config.data.sources.items():
        split = "validation" if source.has_validation else "train"
        texts = list(read_texts(source, config.data, split, _MAX_BYTES.value))
        corpora[name] = {
            "split": split,
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "bytes_per_token": {k: bytes_per_token(t, texts) for k, t in compared.items()},
        }
        unfaithful += find_unfaithful(tokenizer, texts)
    report = {
        "output": _OUTPUT.value,
        "kind": config.data.tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "digest": tokenizer.digest,
        "corpora": corpora,
        # Of all of Unicode and the texts above: what does not come back from its tokens.
        "unfaithful_texts": len(unfaithful),
    }
    if _JSON.value:
        entry.print_json(report)
    else:
        _show(report)


def _all_characters() -> list[str]:
    """Return every Unicode character, in order, in texts of 4,096."""
    return [
        "".join(map(chr, range(start, start + 4096)))
        for start in range(0, 0x110000, 4096)
        if not 0xD000 <= start < 0xE000  # around the surrogates, which are not characters
    ] + ["".join(map(chr, range(0xD000, 0xD800)))]


def _show(report: dict) -> None:
    table = Table("corpus", "split", "documents", "bytes", "bytes per token", "GPT-2's")
    for name, corpus in report["corpora"].items():
        rates = corpus["bytes_per_token"]
        gpt2 = f"{rates['gpt2']:.3f}" if "gpt2" in rates else "-"
        counts = f"{corpus['documents']:,}", f"{corpus['bytes']:,}"
        table.add_row(name, corpus["split"], *counts, f"{rates['this']:.3f}", gpt2)
    console = Console()
    console.print(table)
    faithful = "every text comes back exactly"
    if report["unfaithful_texts"]:
        faithful = f"{report['unfaithful_texts']} texts do not come back exactly"
    console.print(f"{report['vocab_size']:,} tokens in {report['output']}; {faithful}")


if __name__ == "__main__":
    entry.run(main, PretrainConfig)
