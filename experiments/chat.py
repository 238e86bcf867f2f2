"""Talk with a model in the terminal, through its chat template.

    python -m experiments.chat --model=smollm2 [--system="You are terse."]

/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops a reply.
"""

import jax
from absl import flags
from rich.console import Console

from experiments import entry
from experiments.sampling_flags import load_generator

_SYSTEM = flags.DEFINE_string("system", None, "What the model is told before everything.")


def main() -> None:
    generator, params, loaded, key = load_generator()
    if loaded.tokenizer.chat_template is None:
        raise ValueError("this model's tokenizer has no chat template: try experiments.generate")
    console = Console(highlight=False)
    console.print("/reset forgets, /quit or Ctrl-D leaves, Ctrl-C stops a reply.", style="dim")
    start = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
    messages = list(start)
    while True:
        try:
            said = console.input("[bold]you[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        match said:
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                messages = list(start)
                continue
        messages.append({"role": "user", "content": said})
        key, mine = jax.random.split(key)
        console.print("[bold]model[/bold] ", end="")
        prompt = loaded.tokenizer.encode_chat(messages, add_generation_prompt=True)
        reply = ""
        try:
            for piece in generator.stream(params, prompt, mine):
                reply += piece
                console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/dim]", end="")
        except ValueError as error:  # the conversation no longer fits the model
            messages.pop()
            console.print(f"[red]{error}[/red] (/reset starts anew)")
            continue
        console.print()
        messages.append({"role": "assistant", "content": reply})


if __name__ == "__main__":
    entry.run(main)
