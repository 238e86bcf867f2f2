"""The loss of packed conversations is the sum of each one's alone, and so are its gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.data.config import DataConfig, SourceConfig
from llm.data.loader import make_batches
from llm.data.prepare import prepare
from llm.data.tokenizer_training import byte_tokenizer
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, param_shapes
from llm.training.loss import make_causal_lm_loss

LENGTH = 64
MODEL = Transformer(
    TransformerConfig(
        vocab_size=264,
        width=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=32,
        max_length_tokens=LENGTH,
    )
)
CHATS = (
    ("hi", "HELLO"),
    ("one and two?", "3", "sure?", "YES"),
    ("?", "a longer answer"),
    ("name", "X"),
    ("say it", "it"),
)
# A template whose turns end with a line break behind the end token, as ChatML's.
LINES = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


def messages_of(chat):
    roles = ("user", "assistant") * len(chat)
    return [{"role": role, "content": text} for role, text in zip(roles, chat, strict=False)]


def packed_batch(tmp_path, tokenizer):
    """Conversations as fine-tuning reads them: prepared, packed, weighted by the template."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages_of(c)}) + "\n" for c in CHATS))
    source = SourceConfig(paths=(str(path),), format="messages", validation_fraction=0.0)
    config = DataConfig(
        sources={"chats": source}, cache_dir=str(tmp_path), length_tokens=LENGTH, batch_sequences=4
    )
    prepared = prepare(config, tokenizer, tmp_path / "prepared")
    (batch,) = make_batches(prepared.train, None, LENGTH, 4, seed=0, num_epochs=1)
    return {name: x for name, x in batch.items() if name != "cursor"}


def alone(chat, template):
    """One conversation by hand, in a row of its own: weights on what the assistant says."""
    line = [10] if template == "lines" else []
    tokens, weights = ([], []) if line else ([256], [0])
    for turn, text in enumerate(chat):
        answers = turn % 2
        said = [*text.encode(), 257]
        tokens += [260 + answers, *line, *said, *line]
        weights += [0, *(0 for _ in line), *(answers for _ in said), *(0 for _ in line)]
    return {
        "tokens": np.array([tokens[:-1]]),
        "targets": np.array([tokens[1:]]),
        "loss_weights": np.array([weights[1:]], np.float32),
        "segment_ids": np.ones((1, len(tokens) - 1), np.int32),
        "positions": np.arange(len(tokens) - 1)[None],
    }


@pytest.mark.parametrize("template", ["own", pytest.param("lines", marks=pytest.mark.long)])
def test_packed_is_the_sum_of_unpacked(tmp_path, template):
    tokenizer = byte_tokenizer()
    if template == "lines":
        tokenizer = tokenizer.with_chat_template(LINES)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.2, x.shape), x.dtype), param_shapes(MODEL)
    )
    loss_fn = make_causal_lm_loss(MODEL, tile_tokens=32)
    both = jax.jit(lambda p, b: jax.value_and_grad(loss_fn, has_aux=True)(p, b, None))

    batch = packed_batch(tmp_path, tokenizer)
    assert batch["segment_ids"].max() > 1  # so some share a row
    (packed, sums), packed_grads = both(params, batch)
    found = [both(params, alone(chat, template)) for chat in CHATS]
    expected = sum(float(loss) for (loss, _), _ in found)
    grads = jax.tree.map(lambda *each: sum(each), *(grads for _, grads in found))

    answers = sum(len(text) + 1 for chat in CHATS for text in chat[1::2])
    assert float(sums["tokens"]) == answers
    assert float(packed) == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
