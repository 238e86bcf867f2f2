"""Continue text with a model.

    python -m experiments.generate --workdir=runs/tiny --prompt="The film is" [--stream] [--json]
    python -m experiments.generate --model=smollm2 --prompt="The capital of France is"

Several prompts (--prompt and --prompt_file, both repeatable) are one batch; without any, standard
input is the prompt.
"""

import dataclasses
import sys

from absl import flags
from etils import epath

from experiments import entry
from experiments.sampling_flags import load_generator

_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeatable.")
_PROMPT_FILE = flags.DEFINE_multi_string(
    "prompt_file", [], "A UTF-8 file that is one prompt, its last line break aside; repeatable."
)
_STREAM = flags.DEFINE_boolean("stream", False, "Print one prompt's text as it comes.")
_JSON = entry.define_json()


def main() -> None:
    if _STREAM.value and _JSON.value:
        raise ValueError(
            "--stream prints text as it comes, --json one object at the end: one of the two"
        )
    prompts = read_prompts()
    if _STREAM.value and len(prompts) > 1:
        raise ValueError(f"--stream takes one prompt, not {len(prompts)}")
    generator, params, key = load_generator()
    ids = [generator.encode(prompt) for prompt in prompts]
    if _STREAM.value:
        print(prompts[0], end="", flush=True)
        for piece in generator.stream(params, ids[0], key):
            print(piece, end="", flush=True)
        print()
        return
    completions = generator.complete(params, ids, key)
    pairs = list(zip(prompts, completions, strict=True))
    if _JSON.value:
        rows = [{"prompt": prompt} | dataclasses.asdict(done) for prompt, done in pairs]
        entry.print_json({"completions": rows})
        return
    for prompt, done in pairs:
        print(prompt + done.text)


def read_prompts() -> list[str]:
    """Return the prompts of the flags and files, or else what standard input holds."""
    prompts = [
        (f"--prompt={text!r}", text.encode(errors="surrogateescape")) for text in _PROMPT.value
    ]
    prompts += [(path, _trim(epath.Path(path).read_bytes())) for path in _PROMPT_FILE.value]
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError('give --prompt="…", --prompt_file=FILE, or text on standard input')
        prompts = [("standard input", _trim(sys.stdin.buffer.read()))]
    return [_decode(name, text) for name, text in prompts]


def _trim(text: bytes) -> bytes:
    """Leave out the line break that editors and `echo` end a text with."""
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _decode(name: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is invalid") from error


if __name__ == "__main__":
    entry.run(main)
