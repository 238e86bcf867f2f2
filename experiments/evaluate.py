"""Score text with a model: loss in nats a token, bits per byte.

    python -m experiments.evaluate --workdir=runs/tiny --text=FILE [--json]
    python -m experiments.evaluate --model=smollm2 --text=FILE

Without --text, a workdir is scored on the held-out text of its own config, source by source. Tokens
are read through a sliding window, so that each has context before it.

A file is scored as `transformers` would encode it: after BOS only where the model's tokenizer puts
one, and without EOS, since a file need not be a whole document. Held-out documents have both.
"""

import jax
from absl import flags
from etils import epath

from experiments import entry
from experiments.loading import load_model, load_section
from llm.data.config import DataConfig
from llm.data.prepare import prepare
from llm.data.prepared import StoredDocument
from llm.data.tokenizers import Tokenizer
from llm.evaluation.language_modeling import (
    TextScore,
    make_score_step,
    score_documents,
)
from llm.models.config import ComputeConfig
from llm.models.transformer import Transformer
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "The run whose model is scored.")
_MODEL = flags.DEFINE_string(
    "model", None, "Instead: a Hugging Face directory, a GGUF file, or 'smollm2'."
)
_TEXT = flags.DEFINE_multi_string("text", [], "A UTF-8 text file, scored as one text; repeatable.")
_LENGTH = flags.DEFINE_integer(
    "length_tokens", None, "Window; default: the model's, at most 1,024.", 1
)
_STRIDE = flags.DEFINE_integer("stride_tokens", None, "The window's step; default: half of it.", 1)
_BATCH = flags.DEFINE_integer("batch_tokens", 8192, "Tokens scored at a time.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_JSON = entry.define_json()


def main() -> None:
    source = _WORKDIR.value or _MODEL.value
    if not source or (_WORKDIR.value and _MODEL.value):
        raise ValueError("give --workdir=DIR or --model=SOURCE, one of the two")
    if not _WORKDIR.value and not _TEXT.value:
        raise ValueError("--model needs --text=FILE: only a workdir has held-out text of its own")
    texts = {path: epath.Path(path).read_bytes() for path in _TEXT.value}
    config, params, tokenizer, _ = load_model(source)
    length = _LENGTH.value or min(config.max_length_tokens, 1024)
    if length > config.max_length_tokens and config.positions == "learned":
        raise ValueError(
            f"--length_tokens={length}: the model has {config.max_length_tokens} positions"
        )
    if texts:
        documents = {path: [_document(path, text, tokenizer)] for path, text in texts.items()}
    else:
        data = load_section(_WORKDIR.value, "data", DataConfig)
        held_out = prepare(data, tokenizer).validation
        documents = {name: split.documents() for name, split in held_out.items()}

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    score_step = make_score_step(Transformer(config, ComputeConfig(dtype=_DTYPE.value)), mesh)
    with jax.set_mesh(mesh):
        scores = {
            name: score_documents(
                score_step,
                params,
                part,
                row_length=length,
                batch_tokens=_BATCH.value,
                stride=_STRIDE.value,
            )
            for name, part in documents.items()
        }
    report = _figures(sum(scores.values(), TextScore(0.0, 0.0, 0.0)))
    report["by_source"] = {name: _figures(score) for name, score in scores.items()}
    if _JSON.value:
        entry.print_json(report)
        return
    for name, figures in [*report.pop("by_source").items(), ("all", report)]:
        print(
            f"{name}: {figures['loss_nats_per_token']:.4f} nats/token over {figures['tokens']:,} "
            f"tokens, {figures['bits_per_byte']:.4f} bits/byte over {figures['bytes']:,} bytes"
        )


def _document(path: str, text: bytes, tokenizer: Tokenizer) -> StoredDocument:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error
    if not decoded:
        raise ValueError(f"{path} is empty: there is nothing to score")
    prefix, ids = tokenizer.text_prefix, tokenizer.encode(decoded)
    if prefix:
        return StoredDocument([*prefix, *ids], len(text))
    # Without a BOS nothing predicts the first token: it and its bytes are context only.
    if len(ids) == 1:
        raise ValueError(f"{path} is one token, and this model has no BOS to predict it from")
    return StoredDocument(ids, len(text) - len(tokenizer.decode(ids[:1]).encode()))


def _figures(score: TextScore) -> dict:
    return {
        "loss_nats_per_token": score.loss_nats_per_token,
        "tokens": int(score.tokens),
        "bits_per_byte": score.bits_per_byte,
        "bytes": int(score.num_bytes),
    }


if __name__ == "__main__":
    entry.run(main)
