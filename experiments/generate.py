"""Continue text with a model.

    python -m experiments.generate --workdir=runs/tiny --prompt="The film is" [--stream] [--json]
    python -m experiments.generate --model=smollm2 --prompt="The capital of France is"

Several --prompt flags are one batch; without any, the prompt is standard input or --prompt_file.
"""

import sys

from absl import flags
from etils import epath

from experiments import entry
from experiments.sampling_flags import load_generator

_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeatable.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A UTF-8 file with one prompt.")
_STREAM = flags.DEFINE_boolean("stream", False, "Print each piece as it comes.")
_JSON = entry.define_json()


def main() -> None:
    if _STREAM.value and _JSON.value:
        raise ValueError(
            "--stream prints text as it comes, --json one object at the end: one of the two"
        )
    prompts = read_prompts()
    if _STREAM.value and len(prompts) > 1:
        raise ValueError(f"--stream takes one prompt, not {len(prompts)}")
    generator, params, loaded, key = load_generator()
    if _STREAM.value:
        print(prompts[0], end="", flush=True)
        for piece in generator.stream(params, generator.encode(prompts[0]), key):
            print(piece, end="", flush=True)
        print()
        return
    completions = generator.complete(params, [generator.encode(p) for p in prompts], key)
    if _JSON.value:
        fields = [
            {
                "prompt": prompt,
                "text": completion.text,
                "tokens": completion.tokens,
                "log_probs": completion.log_probs,
                "finished": completion.finished,
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        entry.print_json({"completions": fields})
        return
    for prompt, completion in zip(prompts, completions, strict=True):
        print(prompt + completion.text)


def read_prompts() -> list[str]:
    """Return the prompts of the flags, or the file's, or what standard input gives."""
    if _PROMPT.value and _PROMPT_FILE.value:
        raise ValueError("give --prompt or --prompt_file, one of the two")
    if _PROMPT.value:
        return _PROMPT.value
    if _PROMPT_FILE.value:
        path = epath.Path(_PROMPT_FILE.value)
        try:
            return [path.read_text()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError('give --prompt="…", --prompt_file=FILE, or text on standard input')
    return [sys.stdin.read()]


if __name__ == "__main__":
    entry.run(main)
