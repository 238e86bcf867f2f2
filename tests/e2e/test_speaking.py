"""experiments.generate and experiments.chat as a user runs them."""

import json
import subprocess
import sys

import jax
import pytest

from llm.data.tokenizer_training import byte_tokenizer
from llm.interop.huggingface import save_huggingface
from llm.models.config import TransformerConfig
from llm.models.transformer import Transformer, init_params

SMALL = ["--max_new_tokens=5", "--seed=3"]


def run(*command, expect=0, **more):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, timeout=300, **more
    )
    assert done.returncode == expect, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Llama of one layer on bytes, as a Hugging Face directory."""
    tokenizer = byte_tokenizer()
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=24,
        max_length_tokens=64,
    )
    params = jax.jit(lambda key: init_params(Transformer(config), key))(jax.random.key(0))
    folder = tmp_path_factory.mktemp("speaking") / "model"
    save_huggingface(folder, config, jax.device_get(params), tokenizer)
    return folder


def test_generate_streams_what_it_gives_as_json(exported, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file\n")
    generate = ("-m", "experiments.generate", f"--model={exported}", *SMALL)
    out, _ = run(*generate, "--json", "--prompt=né", f"--prompt_file={tmp_path / 'prompt.txt'}")
    first, second = json.loads(out)["completions"]
    assert (first["prompt"], second["prompt"]) == ("né", "from a file")
    for row in (first, second):
        assert set(row) == {"prompt", "text", "tokens", "log_probs", "finished"}
        assert len(row["tokens"]) == len(row["log_probs"]) <= 5
        # an untrained model finds nearly every one of its bytes equally likely
        assert all(-8 < value < -4 for value in row["log_probs"])
    streamed, _ = run(*generate, "--stream", input="né\n".encode())
    assert streamed == f"né{first['text']}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--model=no/such", "--prompt=a"],
            "no/such does not exist; give a Hugging Face directory",
        ),
        (
            ["--workdir=tests", "--prompt=a"],
            "tests is neither a workdir nor a Hugging Face directory",
        ),
        (["--prompt=a"], "give --workdir=DIR or --model=SOURCE"),
        (["--model=smollm2", "--prompt=a", "--top_p=1.5"], "top_p=1.5: must be in (0, 1]"),
        (["--model=smollm2", "--prompt_file=no/file"], "No such file or directory: no/file"),
        (["--model=smollm2", "--prompt=a", "--temprature=1"], "did you mean --temperature?"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    _, error = run("-m", "experiments.generate", *arguments, expect=2)
    assert message in error and error.count("\n") == 1, error


# The shipped chat, on a model that says what it was asked and is stopped at the word "stop".
CHAT = """
import types
from absl import app
from experiments import chat
from llm.data.tokenizer_training import byte_tokenizer

class Model:
    tokenizer = byte_tokenizer()
    model = types.SimpleNamespace(config=types.SimpleNamespace(max_length_tokens=80))
    sampling = types.SimpleNamespace(max_new_tokens=20)

    def stream(self, params, ids, key):
        text = self.tokenizer.decode(ids)
        yield str(text.count("<|user|>")) + " questions\\x1b[2J,"
        if text.endswith("stop<|eos|><|assistant|>"):
            raise KeyboardInterrupt
        yield " " + ("all" if "ALPHA" in text else "not all")

def load():
    import jax
    return Model(), {}, jax.random.key(0)

chat.load_generator = load
app.run(lambda _: chat.main())
"""


def test_a_chat_goes_on_through_stops_resets_and_a_full_window():
    said = [
        "ALPHA",
        "stop",
        "/nonsense",
        "",
        "and so on and on and on",
        "/reset",
        "b",
        "c" * 90,
        "d",
    ]
    out, _ = run("-c", CHAT, input="\n".join(said).encode())
    replies = [part.partition("you> ")[0] for part in out.split("model> ")[1:]]
    assert [" ".join(reply.split()) for reply in replies] == [
        "1 questions[2J, all",
        "2 questions[2J, (stopped)",  # goes on with what was said
        "2 questions[2J, not all",  # the first question no longer fits
        "1 questions[2J, not all",  # after /reset
        "2 questions[2J, not all",  # the message that was too long is gone
    ]
    assert "(forgot the oldest 2 messages)" in out and "(forgotten)" in out
    assert "unknown command /nonsense" in out
    assert "the message needs 94 tokens, and the model's window of 80 has 60 beside a reply" in out
    assert "\x1b" not in out


def test_chat_speaks_with_a_model_and_leaves_at_the_end_of_input(exported):
    chat = ("-m", "experiments.chat", f"--model={exported}", "--system=Be brief.", *SMALL)
    out, _ = run(*chat, input=b"Hello\n")
    assert out.count("you> ") == 2 and out.count("model> ") == 1
    _, error = run(*chat[:-2], "--max_new_tokens=60", input=b"", expect=2)
    assert "the model's window of 64 has 4" in error and error.count("\n") == 1
