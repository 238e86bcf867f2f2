"""A reward model serves the scores that it was trained to give, for the very same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reward import make_score_step
from llm.data.comparisons import ComparisonBatches, encode_feedback
from llm.data.config import ComparisonsConfig
from llm.data.feedback import Feedback
from llm.data.tokenizer_training import byte_tokenizer, train_tokenizer
from llm.models.config import TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import param_shapes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.rl.prompts import Prompt
from llm.rl.reward_model import make_model_reward

WINDOW = 64
MODEL = ScalarModel(
    TransformerConfig(
        vocab_size=400,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=64,
        max_length_tokens=WINDOW,
    )
)
# As ChatML: a line break behind each end token, which no sampler writes.
CHATML = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
ASKED = ({"role": "user", "content": "a film?"},)
ANSWERS = ("good", "bad and long", " so\n")


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    shapes = param_shapes(MODEL)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.2, x.shape), x.dtype), shapes)


def prompt_of(content, identity="tasks.jsonl:7"):
    # Tokens of the policy's own tokenizer: a reward model must not read them.
    return Prompt(({"role": "user", "content": content},), (1, 2, 3), {}, identity)


def trained_score(params, tokenizer, answers):
    """Scores as experiments.reward computes them, of the batches that training reads."""
    record = Feedback("rating", ASKED, answers, tuple(map(float, range(len(answers)))), id="f:1")
    encoded, _ = encode_feedback([record], tokenizer, WINDOW)
    config = ComparisonsConfig(length_tokens=WINDOW, batch_prompts=1, max_responses=len(answers))
    (batch,) = ComparisonBatches(encoded, config, one_pass=True)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return make_score_step(MODEL, mesh)(params, batch)[0]


@pytest.mark.parametrize("template", ["own", "chatml"])
@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_the_served_score_is_the_trained_one(params, kind, template):
    """Whatever the policy's tokenizer: the text is encoded anew by the reward model's."""
    tokenizer = (
        byte_tokenizer() if kind == "bytes" else train_tokenizer(["good bad film\n\n"] * 20, 300)
    )
    if template == "chatml":
        tokenizer = tokenizer.with_chat_template(CHATML)
        said = tokenizer.encode_chat([*ASKED, {"role": "assistant", "content": "good"}])
        assert said[-1] != tokenizer.eos_id  # so there is something behind the end
    served = make_model_reward(MODEL, params, tokenizer, batch_responses=2)
    scores = served([prompt_of("a film?")] * 3, ANSWERS)
    np.testing.assert_allclose(scores, trained_score(params, tokenizer, ANSWERS), rtol=2e-5)
    assert len(set(np.round(scores, 4))) == 3


def test_scores_are_shifted_and_scaled(params):
    tokenizer = byte_tokenizer()
    prompts = [prompt_of("a film?")]
    (raw,) = make_model_reward(MODEL, params, tokenizer)(prompts, ["good"])
    (found,) = make_model_reward(MODEL, params, tokenizer, shift=0.5, scale=2.0)(prompts, ["good"])
    assert found == pytest.approx((raw - 0.5) / 2.0, rel=1e-6)


def test_one_program_serves_all_usual_responses(params):
    prompts, tokenizer = [prompt_of("a film?")], byte_tokenizer()
    narrow = make_model_reward(MODEL, params, tokenizer)
    fixed = make_model_reward(MODEL, params, tokenizer, usual_tokens=48)
    fixed(prompts, ["good"])
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        found = [fixed(prompts, [text]) for text in ("g", "good" * 6)]
        assert not compiled
        expected = [narrow(prompts, [text]) for text in ("g", "good" * 6)]
        assert compiled  # so the listener hears, and two widths are two programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_what_does_not_fit_is_named(params, caplog):
    reward = make_model_reward(MODEL, params, byte_tokenizer())
    long = prompt_of("q" * 40, "tasks.jsonl:9")  # 44 tokens with its marks
    with caplog.at_level("WARNING"):
        cut = reward([prompt_of("a film?"), long], ["good", "x" * 30 + "good"])
    assert "1 responses scored without the beginning of their prompt" in caplog.text
    assert "window being 64: tasks.jsonl:9 (79 tokens)" in caplog.text
    caplog.clear()
    # What is left is the same whatever the lost beginning was; and a row that fits says nothing.
    other = prompt_of("p" * 13 + "q" * 27)
    np.testing.assert_array_equal(reward([other], ["x" * 30 + "good"]), cut[1:])
    caplog.clear()
    reward([long], ["good"])
    assert not caplog.text
    with pytest.raises(ValueError, match="tasks.jsonl:9: the prompt alone has 64 tokens .*is 64"):
        reward([prompt_of("q" * 60, "tasks.jsonl:9")], ["good"])
