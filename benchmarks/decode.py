"""Greedy decoding against `transformers`' generate on torch: SmolLM2's shapes, float32.

    python -m benchmarks.decode [--rounds=3] [--batches=1,16] [--new_tokens=128]

Each round starts both in fresh processes, one after the other; the last line is one JSON object.
`ratio` compares new tokens a second of whole calls, prefill included; `decode_ratio` leaves the
prefill out: it divides the time of a call by one of a single new token less.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Fresh processes of each.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Sequences decoded together.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 64, "Tokens of each prompt.")
_NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens decoded after each prompt.")
_CALLS = flags.DEFINE_integer("calls", 3, "Timed calls of each process; the median counts.")
_CHILD = flags.DEFINE_enum(
    "child", None, ["weights", "ours", "transformers"], "Internal: what this process does."
)
_FOLDER = flags.DEFINE_string("folder", None, "Internal: where the weights are.")

PRESET = "smollm2-135m"


def prompts(batch: int, vocab_size: int) -> np.ndarray:
    shape = (batch, _PROMPT.value)
    return np.random.default_rng(0).integers(3, vocab_size, shape).astype(np.int32)


def measure_ours(folder: Path) -> dict:
    import jax

    from llm.generation.config import SamplingConfig
    from llm.generation.decode import make_generate
    from llm.generation.prompts import sequence_keys
    from llm.interop.huggingface import load_huggingface
    from llm.models.transformer import Transformer
    from llm.models.unstack import unstack, unstacked

    checkpoint = load_huggingface(folder)
    model = Transformer(checkpoint.config)
    params = jax.device_put(unstack(model, checkpoint.params))

    def make_call(batch: int, new_tokens: int):
        config = SamplingConfig(max_new_tokens=new_tokens, temperature=0.0)
        generate = make_generate(unstacked(model), config)
        rows = jax.numpy.asarray(prompts(batch, checkpoint.config.vocab_size))
        lengths = jax.numpy.full(batch, _PROMPT.value)
        keys = sequence_keys(jax.random.key(0), batch)
        return lambda: np.asarray(generate(params, rows, lengths, keys).tokens)

    return measure(make_call)


def measure_transformers(folder: Path) -> dict:
    import torch
    import transformers

    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def make_call(batch: int, new_tokens: int):
        rows = torch.from_numpy(prompts(batch, model.config.vocab_size)).long()
        settings = dict(
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

        def call():
            with torch.inference_mode():
                return model.generate(rows, **settings)[:, _PROMPT.value :].numpy()

        return call

    return measure(make_call)


def measure(make_call) -> dict:
    """Return, by batch size, the seconds of a call and of one of a single token, and the tokens."""
    report = {}
    for batch in map(int, _BATCHES.value):
        one, all_of_them = make_call(batch, 1), make_call(batch, _NEW.value)
        begin = time.perf_counter()
        tokens = all_of_them()
        first = time.perf_counter() - begin
        one()
        report[str(batch)] = {
            "seconds": _median_seconds(all_of_them),
            "prefill_seconds": _median_seconds(one),
            "first_call_seconds": first,
            "tokens": tokens.tolist(),
        }
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return report


def _median_seconds(call) -> float:
    seconds = []
    for _ in range(_CALLS.value):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def summarise(results: dict[str, list[dict]], batch: str) -> dict:
    """Return both sides' figures for one batch size, medians over the rounds, and their ratios."""
    report, new = {}, _NEW.value
    for name, rounds in results.items():
        whole = statistics.median(r[batch]["seconds"] for r in rounds)
        decode = statistics.median(
            r[batch]["seconds"] - r[batch]["prefill_seconds"] for r in rounds
        )
        report[name] = {
            "tokens_per_second": int(batch) * new / whole,
            "decode_milliseconds_per_step": 1000 * decode / (new - 1),
            "prefill_seconds": statistics.median(r[batch]["prefill_seconds"] for r in rounds),
            "first_call_seconds": statistics.median(r[batch]["first_call_seconds"] for r in rounds),
        }
    ours, theirs = report["ours"], report["transformers"]
    same = np.equal(
        results["ours"][0][batch]["tokens"], results["transformers"][0][batch]["tokens"]
    )
    return report | {
        "ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "decode_ratio": theirs["decode_milliseconds_per_step"]
        / ours["decode_milliseconds_per_step"],
        "share_of_equal_tokens": float(np.mean(same)),
    }


def write_weights(folder: Path) -> dict:
    import jax

    from llm.interop.huggingface import save_huggingface
    from llm.models.presets import PRESETS
    from llm.models.transformer import Transformer, init_params

    model = Transformer(PRESETS[PRESET])
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    save_huggingface(folder, model.config, jax.device_get(params))
    return {}


def run_child(name: str, folder: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.decode", f"--folder={folder}", f"--child={name}"]
    out = subprocess.run(
        command + sys.argv[1:], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def main(_) -> None:
    if _CHILD.value:
        children = {
            "weights": write_weights,
            "ours": measure_ours,
            "transformers": measure_transformers,
        }
        print(json.dumps(children[_CHILD.value](Path(_FOLDER.value))))
        return
    results = {"ours": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        # the parent stays small: Linux counts its memory at the fork as a child's peak
        run_child("weights", folder)
        for _ in range(_ROUNDS.value):
            for name, rounds in results.items():
                rounds.append(run_child(name, folder))
                seconds = {b: round(rounds[-1][b]["seconds"], 3) for b in _BATCHES.value}
                print(name, "seconds a call, by batch:", seconds, file=sys.stderr)
    report = {f"batch_{batch}": summarise(results, batch) for batch in _BATCHES.value}
    report["peak_mib"] = {name: max(r["peak_mib"] for r in rs) for name, rs in results.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
