"""experiments.prepare_data as a user runs it."""

import json
import pathlib
import random
import subprocess
import sys

HOUSE = pathlib.Path(__file__).resolve().parents[2]

RECIPE = """
from configs.dataclass_config import to_config_dict
from configs.schema import PretrainConfig
from llm.data.config import SourceConfig

def get_config(arg=None):
    config = to_config_dict(PretrainConfig(total_steps=1))
    source = SourceConfig(paths=({train!r},), validation_paths=({held_out!r},))
    config.data.sources = {{"letters": to_config_dict(source)}}
    config.data.tokenizer.kind = "bytes"
    config.data.length_tokens = 64
    return config
"""


def run(*arguments):
    command = [sys.executable, "-m", "experiments.prepare_data", *arguments]
    return subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)


def test_reports_and_refuses_leaks(tmp_path):
    rng = random.Random(0)
    letters = ["".join(rng.choices("abcdefgh ", k=rng.randint(20, 200))) for _ in range(200)]
    leaked = "P.S. " + letters[150]

    def write(name, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    train = write("train.jsonl", [*letters[:150], letters[3], leaked])
    held_out = write("held_out.jsonl", letters[150:])
    (tmp_path / "recipe.py").write_text(RECIPE.format(train=train, held_out=held_out))
    arguments = [f"--config={tmp_path}/recipe.py", f"--directory={tmp_path}/prepared", "--json"]

    refused = run(*arguments)
    assert refused.returncode == 2 and refused.stdout == ""
    (line,) = [x for x in refused.stderr.splitlines() if x.startswith("error:")]
    assert "1 of 50 held-out documents of source 'letters' nearly occur in training" in line
    assert "held_out.jsonl:1 in " in line and "train.jsonl:152" in line

    allowed = run(*arguments, "--config.data.max_overlap_fraction=0.02")
    assert allowed.returncode == 0, allowed.stderr
    assert "tokenising" not in allowed.stderr  # it was done before
    report = json.loads(allowed.stdout)
    counts = report["train"]["letters"]
    assert counts["documents"] == 151 and counts["dropped_repeated"] == 1
    # A byte a token, and BOS and EOS a document.
    assert counts["tokens"] == counts["bytes"] + 2 * 151
    assert counts["fill_rate"] > 0.95
    assert report["validation"]["letters"]["near_duplicates"] == 1
