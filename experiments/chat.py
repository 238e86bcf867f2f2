"""Talk with a model in the terminal, through its chat template.

    python -m experiments.chat --model=smollm2 [--system="You are terse."]

/reset forgets the conversation; /quit or Ctrl-D leaves; Ctrl-C stops a reply, or empties the line.
"""

import contextlib

import jax
from absl import flags
from rich.console import Console

from experiments import entry
from experiments.sampling_flags import load_generator
from llm.generation.generator import Generator

with contextlib.suppress(ImportError):  # not everywhere
    import readline  # noqa: F401  (gives input() its arrow keys and history)

_SYSTEM = flags.DEFINE_string("system", None, "What the model is told before everything.")

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops a reply"

# What a terminal obeys instead of showing: a model may write escape sequences, too.
_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def main() -> None:
    generator, params, key = load_generator()
    if generator.tokenizer.chat_template is None:
        raise ValueError("this model's tokenizer has no chat template: try experiments.generate")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    start = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
    fit(generator, [*start, {"role": "user", "content": ""}])
    console.print(HELP, style="dim")
    messages = list(start)
    while (said := read_line()) is not None:
        if said == "/reset":
            messages = list(start)
            console.print("(forgotten)", style="dim")
        elif said == "/quit":
            return
        elif said.startswith("/"):
            console.print(f"unknown command {said.split()[0]}: {HELP}", style="red")
        elif said:
            key, mine = jax.random.split(key)
            messages = turn(
                generator, params, mine, [*messages, {"role": "user", "content": said}], console
            )
    console.print()


def read_line() -> str | None:
    """Return what the user types, "" for a line given up with Ctrl-C, None at the end."""
    try:
        return input("you> ").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        return None


def turn(
    generator: Generator, params: dict, key: jax.Array, messages: list[dict], console: Console
) -> list[dict]:
    """Print the model's reply as it comes; return the conversation with it.

    Stopped with Ctrl-C, a reply stays as far as it got; one not yet begun takes the question along.
    """
    try:
        kept, prompt = fit(generator, messages)
    except ValueError as error:
        console.print(str(error), style="red")
        return messages[:-1]
    if len(kept) < len(messages):
        console.print(f"(forgot the oldest {len(messages) - len(kept)} messages)", style="dim")
    reply = ""
    try:
        console.print("model> ", end="", style="bold")
        for piece in generator.stream(params, prompt, key):
            reply += piece
            console.out(piece.translate(_CONTROLS), end="", highlight=False)
        console.print()
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim")
        if not reply:
            return kept[:-1]
    return [*kept, {"role": "assistant", "content": reply}]


def fit(generator: Generator, messages: list[dict]) -> tuple[list[dict], list[int]]:
    """Return as much of a conversation as leaves room for a reply, and its tokens.

    The oldest questions go first, each with its answer; the system's message stays.

    Raises:
      ValueError: the last message alone is too long.
    """
    room = generator.model.config.max_length_tokens - generator.sampling.max_new_tokens
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while True:
        kept = system + turns
        ids = generator.tokenizer.encode_chat(kept, add_generation_prompt=True)
        if len(ids) <= room:
            return kept, ids
        if len(turns) < 3:  # the question itself, without an older one and its answer
            raise ValueError(
                f"the message needs {len(ids)} tokens, and the model's window of "
                f"{generator.model.config.max_length_tokens} has {max(room, 0)} beside a reply of "
                f"max_new_tokens={generator.sampling.max_new_tokens}"
            )
        turns = turns[2:]


if __name__ == "__main__":
    entry.run(main)
